"""Rehearsal: samples of a file on which anchors hold θ, so that training does not unlearn them.

    loss = objective and anchors over the step's own samples + Σ_a c_a D_a over rehearsed samples

Each part is a mean over its own decisions. Rehearsed samples have no advantage, and no part in any statistic of the step.
Samples that were drawn from the anchor's weights can estimate divergences as expectations under the anchor: forward KL,
Jensen-Shannon and others of core/f_divergences.py. They also cover samples that θ no longer draws (DPH-RL,
arXiv:2509.07430).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from difrl.config import RunConfig
from difrl.data.rollout import Rollout
from difrl.policies.base import Policy
from difrl.runtime.distributed import DistributedContext
from difrl.training.rollout_source import RolloutSource, build_dataset_rollouts


@dataclass(frozen=True)
class Rehearsal:
    """Rehearsed samples, and the anchors that are measured on them."""

    source: RolloutSource
    local_groups: Sequence[int]
    """Groups of a step that belong to this process."""
    groups_per_step: int
    """Number of groups of a step over all processes."""
    anchors: tuple[str, ...]
    """Labels of the anchors."""

    def draw(self, step: int) -> Rollout:
        """Return the rehearsed samples of a step, without images."""
        return self.source.draw(step, 0, self.local_groups, lambda section: None).without_images().rollout


def build_rehearsal(config: RunConfig, policy: Policy, processes: DistributedContext) -> Rehearsal | None:
    """Build the rehearsal of a recipe, if it has one. Raise ModelError for rows that the policy cannot take."""
    if config.rehearsal is None:
        return None
    anchors = tuple(anchor.label for anchor in config.anchors if anchor.samples == "rehearsal")
    count = config.rehearsal.prompts_per_step
    source = build_dataset_rollouts(config.rehearsal, config, policy, processes.device)
    policy.validate_prompts([group.prompt for group in source.recorded])
    return Rehearsal(source, range(processes.rank, count, processes.count), count, anchors)
