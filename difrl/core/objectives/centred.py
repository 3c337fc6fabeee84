"""Regression of log ratios on rewards, both centred within a group: centred reward distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from difrl.core.groups import group_mean, group_softmax
from difrl.core.likelihoods import Likelihoods
from difrl.core.numerics import check_bound, to_unit_interval
from difrl.core.objectives.base import LossAndMetrics, Objective, Tensors
from difrl.core.objectives.clipped import ratio_metrics

Form = Literal["squared", "bce"]
RewardScale = Literal["unit", "raw"]

RAW_BOUND = 0.5
"""a of raw rewards: up to a shift, r = A is clip(A, -a, a) / (2 a) + 1/2 at a = 1/2 without the clipping."""


def _squared(implicit: Tensor, reward: Tensor) -> Tensor:
    return (implicit - reward).square()


def _bce(implicit: Tensor, reward: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(implicit, reward.sigmoid(), reduction="none")


FORM_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType({"squared": _squared, "bce": _bce})
"""(beta (D - mean D), r - mean r), both [B, J] -> loss [B, J]."""


@dataclass(frozen=True)
class CentredRewardDistillation(Objective):
    """CRD (2603.14128): fit beta log(pi_theta / pi_old) to r up to a constant in each group.

    Where the two differ by a constant, pi_theta is the tilted distribution pi_old exp(r / beta), whatever the constant.

        L_ij = (a / beta) f(beta (D_ij - mean D), r_i - mean r),    D = l_theta - l_old
        f(x, y) = (x - y)^2  ("squared"),  or  BCE(sigmoid(x); sigmoid(y))  ("bce")
        r = clip(A, -a, a) / (2 a) + 1/2 ("unit"), or the advantages as they are ("raw", a = 1/2)

    Means run over the samples of the group at decision j; mean D is a constant in the gradient. With a temperature T
    the loss is the average of two losses, whose means weight samples by softmax(r / T) and by softmax(-r / T): each
    sample is compared with the good samples and with the bad ones. At theta = old, squared and without temperature,
    the gradient is -(A - mean A) grad l for |A| <= a.

    decisions = "each" is the published form, with one time a sample. With several decisions a sample, "mean" or "sum"
    are taken of D before the square. This is needed where only the sum is a log-likelihood; with "each", beta is relative
    to the part of it that a single decision holds. With "raw" and advantages that are the rewards (no standard
    deviation, no clipping), beta is that of the tilted distribution.

    Attributes:
      beta: strength of the tilt.
      bound: a for "unit"; unused for "raw".
      form: f.
      reward: r.
      temperature: T, or None for unweighted means.

    Metrics: ratio; approx_kl; "centred/error" (squared error of the centred pair, for every f; mean over the two
    directions).
    """

    beta: float = 1.0
    bound: float = 5.0
    form: Form = "squared"
    reward: RewardScale = "unit"
    temperature: float | None = None

    scope = "group"

    def __post_init__(self) -> None:
        check_bound(self.bound)
        if not self.beta > 0 or not (self.temperature is None or self.temperature > 0):
            raise ValueError(
                f"beta is {self.beta} and temperature {self.temperature}, expected positive numbers, or None "
                "for no temperature"
            )
        if self.form not in FORM_LOSSES or self.reward not in ("unit", "raw"):
            raise ValueError(
                f"form is {self.form!r} and reward {self.reward!r}, expected one of {sorted(FORM_LOSSES)}, and "
                "'unit' or 'raw'"
            )

    @property
    def clip_range(self) -> float:
        return 1.0 / self.beta

    def excursion(self, lik: Likelihoods) -> Tensor:
        """Return |D|, [B, J]."""
        return lik.log_ratio("old").abs()

    @property
    def slopes(self) -> tuple[float, ...]:
        """Slopes of the exponents that weight samples in the means, one for each direction."""
        return (0.0,) if self.temperature is None else (1.0 / self.temperature, -1.0 / self.temperature)

    def summarise(self, lik: Likelihoods) -> dict[str, Tensor]:
        return {"delta": lik.log_ratio("old").detach()}

    def statistics(self, rows: Tensors, mask: Tensor, advantages: Tensor, groups: Tensor) -> dict[str, Tensor]:
        r, means = self._rewards(advantages), {}
        for number, slope in enumerate(self.slopes):
            weights = group_softmax(groups, slope * r, mask)
            means[f"delta/{number}"] = group_mean(groups, rows["delta"], weights)
            means[f"reward/{number}"] = group_mean(groups, r, weights)
        return means

    def loss_and_metrics(self, lik: Likelihoods, advantages: Tensor, statistics: Tensors) -> LossAndMetrics:
        r, delta = self._rewards(advantages), lik.log_ratio("old")
        pairs = [
            (self.beta * (delta - statistics[f"delta/{k}"]), r - statistics[f"reward/{k}"])
            for k in range(len(self.slopes))
        ]
        factor = (self.bound if self.reward == "unit" else RAW_BOUND) / self.beta
        loss = factor * torch.stack([FORM_LOSSES[self.form](x, y) for x, y in pairs]).mean(0)
        error = torch.stack([_squared(x.detach(), y) for x, y in pairs]).mean(0)
        return loss, ratio_metrics(delta) | {"centred/error": error}

    def _rewards(self, advantages: Tensor) -> Tensor:
        return to_unit_interval(advantages, self.bound) if self.reward == "unit" else advantages
