"""KL in the reward: anchors reduce the reward of a sample, or the advantages of its decisions, by log ratios.

    r_i <- r_i - sum_a beta_a sum_j (l_ij(sampler) - l_ij(a))

over anchors a whose place is the reward. With one update a step, and advantages without division by a standard deviation,
the fixed point is pi_ref exp(r / beta), where l is summed over a sample's dimensions (likelihood.reduce: sum).

An anchor whose place is the decision subtracts each term from the advantage of that decision alone. The effect of a
decision on later ones is then ignored, as in on-policy distillation. With a teacher at lambda and a reference at
1 - lambda,

    A_ij = A_i - lambda (l_ij - l_ij(teacher)) - (1 - lambda) (l_ij - l_ij(reference))

is G-OPD (2602.12125): on-policy distillation at lambda = 1, and beyond the teacher for lambda > 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difrl.config import AnchorConfig
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.policies.base import Decisions, Part, Penalty, Policy


@dataclass(frozen=True)
class RewardKL:
    """Labels of the anchors whose place is not the loss."""

    rewards: tuple[str, ...]
    decisions: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.rewards, *self.decisions)

    @classmethod
    def build(cls, anchors: Sequence[AnchorConfig]) -> RewardKL:
        places = [[a.label for a in anchors if a.place == place] for place in ("reward", "decision")]
        return cls(tuple(places[0]), tuple(places[1]))


@torch.no_grad()
def evaluate_penalties(
    policy: Policy, rollout: Rollout, decisions: Decisions, microbatches: Sequence[Part], anchors: Collection[str]
) -> dict[str, Penalty]:
    """Return anchor -> its penalty of every decision, [B, J], 0 where masked."""
    found: dict[str, Penalty] = {}
    penalties = policy.penalties(rollout, decisions, microbatches, anchors) if anchors else ()
    for (rows, columns), values in zip(microbatches, penalties, strict=bool(anchors)):
        part = decisions.select(rows, columns)
        for name, value in values.items():
            empty = [x.new_zeros(decisions.mask.shape) for x in (value.amount, value.divergence)]
            whole = found.setdefault(name, Penalty(*empty))
            whole.amount[rows, columns] = torch.where(part.mask, value.amount, 0.0)
            whole.divergence[rows, columns] = torch.where(part.mask, value.divergence, 0.0)
    return found


def subtract_kl(
    scored: ScoredRollout, amounts: Mapping[str, Tensor], coefficients: Mapping[str, float]
) -> ScoredRollout:
    """Subtract each anchor's coefficient times its amount [B] from the rewards. `parts` keep the rewards before it."""
    total = torch.zeros_like(scored.rewards)
    for name, amount in amounts.items():
        total = total + (coefficients[name] * amount).to(total.dtype)
    return replace(scored, rewards=scored.rewards - total)
