"""Settings of a run that exclude each other. Each check yields the conflicts that it finds.

A conflict is the key to change and a sentence: what was found, what was expected, what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from difrl.config.checks.advantages import check_advantages
from difrl.config.checks.anchors import check_anchors
from difrl.config.checks.conflict import ConfigConflict, ConfigConflictError
from difrl.config.checks.data import check_data
from difrl.config.checks.likelihoods import check_likelihoods
from difrl.config.checks.model import check_model
from difrl.config.checks.monitoring import check_monitoring
from difrl.config.checks.objectives import check_objectives
from difrl.config.checks.rehearsal import check_rehearsal
from difrl.config.checks.rewards import check_rewards
from difrl.config.checks.sampling import check_sampling
from difrl.config.checks.texts import check_text_settings
from difrl.config.schema.run import RunSections

__all__ = ["ConfigConflict", "ConfigConflictError", "find_conflicts"]


def find_conflicts(config: RunSections) -> list[ConfigConflict]:
    """Return all conflicts, in the order of the checks below."""
    return [conflict for check in _CHECKS for conflict in check(config)]


_CHECKS: tuple[Callable[[RunSections], Iterator[ConfigConflict]], ...] = (
    check_model,
    check_sampling,
    check_likelihoods,
    check_data,
    check_anchors,
    check_objectives,
    check_text_settings,
    check_rehearsal,
    check_rewards,
    check_advantages,
    check_monitoring,
)
