"""KL in the reward: what a sample's own likelihoods cost it before advantages are taken.

    r_i <- r_i - sum_a beta_a sum_j (l_ij(sampler) - l_ij(a))

over anchors a whose place is the reward. Its fixed point, with one update a step and advantages that no standard
deviation divides, is pi_ref exp(r / beta), where l is summed over a sample's dimensions (likelihood.reduce: sum).

An anchor whose place is the decision takes each term off that decision's own advantage alone. No decision then answers for
what it does to those after it, as in on-policy distillation. With a teacher at lambda and a reference at 1 - lambda,

    A_ij = A_i - lambda (l_ij - l_ij(teacher)) - (1 - lambda) (l_ij - l_ij(reference))

is G-OPD (2602.12125): on-policy distillation at lambda = 1, and beyond the teacher for lambda > 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difrl.config import AnchorConfig
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.policies.base import Decisions, Penalty, Policy


@dataclass(frozen=True)
class RewardKL:
    """Labels of the anchors that are no part of the loss."""

    rewards: tuple[str, ...]
    decisions: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.rewards, *self.decisions)

    @classmethod
    def of(cls, anchors: Sequence[AnchorConfig]) -> RewardKL:
        places = [[a.label for a in anchors if a.place == place] for place in ("reward", "decision")]
        return cls(tuple(places[0]), tuple(places[1]))


@torch.no_grad()
def penalties(
    policy: Policy, rollout: Rollout, decisions: Decisions, chunks: Iterable[tuple[Tensor | slice, slice]]
) -> dict[str, Penalty]:
    """Anchor -> what it makes of each decision, 0 where it does not count. chunks: rows and columns evaluated at once."""
    found: dict[str, Penalty] = {}
    for rows, columns in chunks:
        part = decisions.select(rows, columns)
        for name, value in policy.penalties(rollout.select(rows), part).items():
            empty = [x.new_zeros(decisions.mask.shape) for x in (value.amount, value.divergence)]
            own = found.setdefault(name, Penalty(*empty))
            own.amount[rows, columns] = torch.where(part.mask, value.amount, 0.0)
            own.divergence[rows, columns] = torch.where(part.mask, value.divergence, 0.0)
    return found


def subtract_kl(
    scored: ScoredRollout, charges: Mapping[str, Tensor], coefficients: Mapping[str, float]
) -> ScoredRollout:
    """With the rewards less each anchor's coefficient times the sample's charge [B]; `parts` stay as they were scored."""
    cost = torch.zeros_like(scored.rewards)
    for name, value in charges.items():
        cost = cost + (coefficients[name] * value).to(cost.dtype)
    return replace(scored, rewards=scored.rewards - cost)
