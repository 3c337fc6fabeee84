"""Objectives for pairs of a better and a worse sample: DPO and its relatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from difrl.core.f_divergences import f_divergence
from difrl.core.groups import group_first_max, group_sum
from difrl.core.likelihoods import Likelihoods
from difrl.core.objectives.base import GroupObjective, LossAndMetrics, Tensors

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]
Loss = Literal["logistic", "squared"]

LOSSES: Mapping[str, Callable[[Tensor, float], Tensor]] = MappingProxyType(
    {
        "logistic": lambda margin, beta: F.softplus(-beta * margin),
        "squared": lambda margin, beta: (margin - 1.0 / (2.0 * beta)).square(),
    }
)
"""-log sigmoid(beta h) (DPO, 2305.18290, eq. 7); (h - 1 / (2 beta))^2 (IPO, 2310.12036, eq. 17)."""


@dataclass(frozen=True)
class Preference(GroupObjective):
    """DPO (2305.18290) and its relatives: the better of two samples should gain more probability over the reference.

        h = g(D_w) - g(D_l),    D = l_theta - l_ref,    g = f' of the divergence between theta and the reference
        L = loss(h), or ((1 - e) loss(h) - e loss(-h)) / (1 - 2 e) if a share e of the labels is flipped
        (rDPO, 2403.00409: unbiased for the loss with clean labels)

    g is, up to a constant, log u, -1/u, log(2u / (1 + u)) or (1 - u^-alpha) / alpha, u = exp(D) (f-DPO, 2309.16240).

    w and l are the samples with the highest and the lowest advantage of each group (the first of each with ties). A
    group with equal advantages, and every other sample, has no loss. Each of the two rows of a pair holds half of L,
    scaled so that the mean over all rows is the mean over groups, weighted by their size: for pairs, the mean over
    pairs. In each row the other half is a constant, and the gradient is doubled, which is exact for any split.

    For images l is the forward likelihood and a pair shares (t, noise). With decisions = "each" this is
    Diffusion-DPO (2311.12908), whose beta times T is our beta times the weighting.

    Attributes:
      beta: strength of the regularisation towards the reference.
      loss, divergence: as above.
      alpha: parameter of the alpha-divergence; 1 is forward KL, the limit 0 reverse KL.
      flip: e, in [0, 1/2).
      reference: name of the likelihoods' reference.

    Metrics: "preference/margin" (h of the pairs) and "preference/accuracy" (1 where h > 0), both means over
    groups; a group with equal advantages counts as 0.
    """

    beta: float = 0.1
    loss: Loss = "logistic"
    divergence: Divergence = "reverse_kl"
    alpha: float = 0.5
    flip: float = 0.0

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.alpha > 0 or not 0 <= self.flip < 0.5:
            raise ValueError(
                f"beta is {self.beta}, alpha {self.alpha}, flip {self.flip}; expected beta > 0, alpha > 0, "
                "0 <= flip < 1/2"
            )
        if self.loss not in LOSSES or self.divergence not in get_args(Divergence):
            raise ValueError(
                f"loss is {self.loss!r} and divergence {self.divergence!r}, expected one of {sorted(LOSSES)} "
                f"and of {sorted(get_args(Divergence))}"
            )

    @property
    def clip_range(self) -> float:
        return 1.0 / (self.beta if self.loss == "logistic" else 2.0 * self.beta)

    def statistics(self, rows: Tensors, mask: Tensor, advantages: Tensor, groups: Tensor) -> dict[str, Tensor]:
        # In a group with equal advantages one row is both, and its sign is 0.
        best, worst = group_first_max(groups, advantages, mask), group_first_max(groups, -advantages, mask)
        sign = torch.where(best & worst, 0.0, best.to(torch.float64) - worst.to(torch.float64))
        partner = sign.abs() * (group_sum(groups, rows["delta"] * sign.abs()) - rows["delta"])
        statistics = {"partner": partner, "sign": sign, "size": group_sum(groups, mask)}
        return {name: value.to(rows["delta"].dtype) for name, value in statistics.items()}

    def loss_and_metrics(self, lik: Likelihoods, advantages: Tensor, statistics: Tensors) -> LossAndMetrics:
        sign, half = statistics["sign"], statistics["size"] / 2.0
        slope, pair_loss = f_divergence(self.divergence, self.alpha).slope, LOSSES[self.loss]
        # Rows without a partner are cut off before f': an infinite f' would turn their zero gradient into NaN.
        delta = torch.where(sign != 0, lik.log_ratio(self.reference), 0.0)
        margin = sign * (slope(delta) - slope(statistics["partner"]))
        flipped = self.flip * pair_loss(-margin, self.beta)
        value = ((1.0 - self.flip) * pair_loss(margin, self.beta) - flipped) / (1.0 - 2.0 * self.flip)
        loss = torch.where(sign != 0, half * (2.0 * value - value.detach()), 0.0)
        margin = margin.detach()
        return loss, {
            "preference/margin": half * margin,
            "preference/accuracy": half * (margin > 0).to(margin.dtype),
        }
