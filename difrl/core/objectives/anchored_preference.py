"""Objective for soft preferences over a whole group: ADPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difrl.core.groups import group_logsumexp, group_sum
from difrl.core.likelihoods import Likelihoods
from difrl.core.objectives.base import GroupObjective, LossAndMetrics, Tensors

ROUNDING = 1e-5
"""Margin by which n q must exceed 1 to be above average. With equal advantages n q is 1 up to the rounding of exp and log."""


@dataclass(frozen=True)
class AnchoredPreference(GroupObjective):
    """ADPO (2510.18913): the softmax of log ratios over a group fits the softmax of advantages.

        L = KL(q || p),    q = softmax(A / target_temperature),    p = softmax(D / temperature),
        D = l_theta - l_ref, softmaxes over the samples of the group at decision j

    For a pair it is DPO (2305.18290) with soft labels at beta = 1 / temperature (up to the labels' entropy),
    and DPO itself as target_temperature tends to 0. Its optimum is pi_ref exp(A temperature / target_temperature).
    A row holds n q (log q - log p), n the size of its group, and the gradient (n / temperature) (p - q) grad l, so
    that the mean over rows is the mean over groups, weighted by their size.

    Attributes:
      temperature: of log ratios; 1 / beta.
      target_temperature: of advantages.
      reference: name of the likelihoods' reference: "base", or "old" for an anchor that moves with theta.

    Metrics: "preference/kl" (L, mean over groups); "preference/accuracy" (mass of p on the samples with
    above-average q).
    """

    temperature: float = 1.0
    target_temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not self.target_temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature} and target_temperature {self.target_temperature}, expected "
                "positive numbers"
            )

    @property
    def clip_range(self) -> float:
        return self.temperature

    def statistics(self, rows: Tensors, mask: Tensor, advantages: Tensor, groups: Tensor) -> dict[str, Tensor]:
        statistics = {
            "target": group_logsumexp(groups, advantages / self.target_temperature, mask),
            "model": group_logsumexp(groups, rows["delta"] / self.temperature, mask),
            "size": group_sum(groups, mask),
        }
        return {name: value.to(rows["delta"].dtype) for name, value in statistics.items()}

    def loss_and_metrics(self, lik: Likelihoods, advantages: Tensor, statistics: Tensors) -> LossAndMetrics:
        scaled = lik.log_ratio(self.reference) / self.temperature
        log_q = torch.where(lik.mask, advantages / self.target_temperature - statistics["target"], 0.0)
        log_p = torch.where(lik.mask, scaled.detach() - statistics["model"], 0.0)
        q, p, size = log_q.exp(), log_p.exp(), statistics["size"]
        value = size * q * (log_q - log_p)
        gradient = size * (p - q)
        loss = value + gradient * (scaled - scaled.detach())
        good = q * size > 1.0 + ROUNDING
        return loss, {"preference/kl": value, "preference/accuracy": torch.where(good, size * p, 0.0)}
