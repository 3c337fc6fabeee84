"""What must hold between the parts of a run's config: each check finds settings that exclude each other.

A check yields the key to change and a sentence that says what was found, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from difrl.config.checks.advantages import advantage_misfits
from difrl.config.checks.anchors import anchor_misfits
from difrl.config.checks.conflict import ConfigConflict, ConfigConflictError
from difrl.config.checks.data import data_misfits
from difrl.config.checks.likelihoods import likelihood_misfits
from difrl.config.checks.monitoring import watching_misfits
from difrl.config.checks.objectives import objective_misfits
from difrl.config.checks.rehearsal import rehearsal_misfits
from difrl.config.checks.rewards import reward_misfits
from difrl.config.checks.sampling import sampling_misfits
from difrl.config.checks.texts import text_misfits

if TYPE_CHECKING:
    from difrl.config.schema.run import RunSections as RunConfig

__all__ = ["Misfit", "MisfitError", "misfits"]


def find_conflicts(config: RunConfig) -> list[ConfigConflict]:
    """All that does not go together, in the order of the checks below."""
    return [conflict for check in _CHECKS for conflict in check(config)]


_CHECKS: tuple[Callable[[RunConfig], Iterator[ConfigConflict]], ...] = (
    sampling_misfits,
    likelihood_misfits,
    data_misfits,
    anchor_misfits,
    objective_misfits,
    text_misfits,
    rehearsal_misfits,
    reward_misfits,
    advantage_misfits,
    watching_misfits,
)
