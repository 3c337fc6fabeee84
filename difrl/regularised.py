"""KL in the reward: what a sample's own likelihoods cost it before advantages are taken.

    r_i <- r_i - sum_a beta_a sum_j (l_ij(sampler) - l_ij(a))

over anchors a whose place is the reward. Its fixed point, with one update a step and advantages that no standard
deviation divides, is pi_ref exp(r / beta), where l is summed over a sample's dimensions (likelihood.reduce: sum).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from difrl.policies.base import Decisions, Policy
from difrl.rollout import Rollout, Scored


@torch.no_grad()
def divergences(
    policy: Policy, rollout: Rollout, decisions: Decisions, chunks: Iterable[tuple[Tensor | slice, slice]]
) -> dict[str, Tensor]:
    """Anchor -> k1 summed over each sample's decisions, [B]. chunks: rows and columns that are evaluated at once."""
    total: dict[str, Tensor] = {}
    for rows, columns in chunks:
        part = decisions.select(rows, columns)
        for name, value in policy.penalties(rollout.select(rows), part).items():
            own = total.setdefault(name, value.new_zeros(len(rollout)))
            own[rows] += torch.where(part.mask, value, 0.0).sum(dim=1)
    return total


def charged(scored: Scored, divergence: Mapping[str, Tensor], coefficients: Mapping[str, float]) -> Scored:
    """With the rewards less each anchor's coefficient times the sample's divergence; `parts` stay as they were scored."""
    cost = torch.zeros_like(scored.rewards)
    for name, value in divergence.items():
        cost = cost + (coefficients[name] * value).to(cost.dtype)
    return replace(scored, rewards=scored.rewards - cost)
