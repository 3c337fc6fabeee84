"""Samples of a file on which anchors hold θ, beside those that a step learns from: what θ shall not unlearn.

    loss = objective and anchors over the step's own samples + Σ_a c_a D_a over rehearsed samples

each a mean over its own decisions. Rehearsed samples have no advantage, and no part in any statistic of the step. Drawn
from the anchor's weights they estimate a divergence from its side, which those of θ cannot: forward KL, Jensen-Shannon and
others of core/f_divergences.py, without forgetting what θ no longer draws (DPH-RL, arXiv:2509.07430).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from difrl.config import RunConfig
from difrl.data.rollout import Rollout
from difrl.policies.base import Policy
from difrl.policies.references import get_rehearsal_needs
from difrl.runtime.distributed import DistributedContext
from difrl.training.rollout_source import RolloutSource, recorded


@dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed, and for which anchors."""

    source: RolloutSource
    groups: Sequence[int]
    """Of a step, those of this process."""
    labels: tuple[str, ...]
    """Of the anchors that are measured on it."""
    needs: frozenset[str]
    """What they read of the likelihoods, by the names of `Likelihoods.terms`."""

    def draw(self, step: int) -> Rollout:
        """The rehearsed samples of a step, without images."""
        return self.source.draw(step, 0, self.groups, lambda part: None).without_images().rollout


def rehearsal_of(
    config: RunConfig, policy: Policy, device: torch.device, processes: DistributedContext
) -> Rehearsal | None:
    """The rehearsal of a recipe, if it has one; ModelError names rows that the policy cannot take."""
    if config.rehearsal is None:
        return None
    labels = tuple(anchor.label for anchor in config.anchors if anchor.samples == "rehearsal")
    groups = range(processes.rank, config.rehearsal.prompts_per_step, processes.count)
    source = recorded(config.rehearsal, config, policy, device)
    policy.refuse([example.prompt for example in source.examples])
    return Rehearsal(source, groups, labels, get_rehearsal_needs(config))
