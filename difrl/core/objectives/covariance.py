"""Policy gradients that preserve entropy by restraining few decisions: Clip-Cov and KL-Cov.

A policy-gradient step lowers the entropy of a softmax by about the covariance of log-probability and advantage
(2505.22617, eq. 8). A few decisions contribute most of it. The contribution of a decision, over all decisions of an
update, is

    cov_ij = (l_ij - mean l) (A_ij - mean A)

Clip-Cov removes some of the decisions with large contributions from the gradient; KL-Cov penalises the KL from old at
the largest ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difrl.core.likelihoods import Likelihoods
from difrl.core.objectives.base import LossAndMetrics, Objective, Tensors
from difrl.core.objectives.clipped import check_bounds, narrower, ratio_metrics, surrogate


def covariances(logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Return cov_ij (2505.22617, eq. 10), 0 where masked; its mean is the covariance. [B, J] each -> [B, J].

    Means run in float64, so that results do not depend on the order of the rows.
    """
    count = mask.sum().clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        values = torch.where(mask, x.double(), 0.0)
        return values - values.sum() / count

    return torch.where(mask, centred(logp) * centred(advantages), 0.0).to(logp.dtype)


@dataclass(frozen=True)
class ClipCov(Objective):
    """Clipped, without a part of the decisions whose covariance lies between two bounds (2505.22617, eq. 11-12).

        L_ij = (1 - p_ij) max(-A rho, -A clip(rho, 1 - low, 1 + high))
        p_ij = min(1, max(1, floor(share N)) / n)  where lowest < cov_ij < highest, else 0

    There are N decisions, and n of them are between the bounds and not clipped by rho. The authors draw share N of the n
    at random, but at least one, and detach them. p is the probability of being drawn, so this is the mean of their loss,
    and of its gradient, over all draws. It needs no random numbers, and does not depend on the order of the rows.

    Attributes:
      low, high: bounds of rho, as in Clipped.
      share: r, relative to all decisions.
      lowest, highest: omega, the bounds between which a covariance must lie.

    Metrics: those of Clipped; "covariance/mean" (cov_ij); "covariance/held" (p_ij).
    """

    low: float | None = 1.0
    high: float | None = 1.0
    share: float = 2e-4
    lowest: float = 1.0
    highest: float = 5.0

    scope = "batch"

    def __post_init__(self) -> None:
        check_bounds(self.low, self.high)
        check_share(self.share)
        if not self.lowest < self.highest:
            raise ValueError(
                f"lowest is {self.lowest} and highest {self.highest}, expected lowest below highest; exchange the bounds"
            )

    @property
    def clip_range(self) -> float:
        return narrower(self.low, self.high)

    def summarise(self, lik: Likelihoods) -> dict[str, Tensor]:
        return {"logp": lik.logp.detach(), "delta": lik.log_ratio("old").detach()}

    def statistics(self, rows: Tensors, mask: Tensor, advantages: Tensor, groups: Tensor) -> dict[str, Tensor]:
        cov = covariances(rows["logp"], advantages, mask)
        clipped = sum(surrogate(advantages, rows["delta"].exp(), self.low, self.high)[1].values())
        between = mask & (cov > self.lowest) & (cov < self.highest) & (clipped == 0)
        chance = (get_number(self.share, mask) / between.sum().clamp(min=1)).clamp(max=1.0)
        return {"covariance": cov, "held": between * chance.to(cov.dtype)}

    def loss_and_metrics(self, lik: Likelihoods, advantages: Tensor, statistics: Tensors) -> LossAndMetrics:
        log_ratio = lik.log_ratio("old")
        loss, clipping = surrogate(advantages, log_ratio.exp(), self.low, self.high)
        return (1.0 - statistics["held"]) * loss, ratio_metrics(log_ratio) | clipping | covariance_metrics(statistics)


@dataclass(frozen=True)
class KLCov(Objective):
    """The policy gradient, with a penalty on the decisions with the largest covariances (2505.22617, eq. 13-14).

        L_ij = -A rho + coefficient |log rho|  where cov_ij is among the share N largest of N, else -A rho

    |log rho| is the authors' estimate of KL(old || theta). Its slope is 0 at theta = old, but 1 as soon as rounding
    separates the two: evaluate old in the same way as theta, and do not use the log-probabilities of the sampler.

    Attributes:
      share: k, relative to all decisions; at least one decision. Of equal covariances all count.
      coefficient: factor of the penalty.

    Metrics: ratio, approx_kl; "covariance/mean" (cov_ij); "covariance/held" (1 where the penalty applies).
    """

    share: float = 2e-3
    coefficient: float = 1.0

    scope = "batch"

    def __post_init__(self) -> None:
        check_share(self.share)
        if not self.coefficient > 0:
            raise ValueError(f"coefficient is {self.coefficient}, expected a number above 0")

    def summarise(self, lik: Likelihoods) -> dict[str, Tensor]:
        return {"logp": lik.logp.detach()}

    def statistics(self, rows: Tensors, mask: Tensor, advantages: Tensor, groups: Tensor) -> dict[str, Tensor]:
        cov = covariances(rows["logp"], advantages, mask)
        unmasked = cov[mask]
        number = min(len(unmasked), get_number(self.share, mask))
        threshold = unmasked.topk(number).values.amin() if number else cov.new_zeros(())
        return {"covariance": cov, "held": (mask & (cov >= threshold)).to(cov.dtype)}

    def loss_and_metrics(self, lik: Likelihoods, advantages: Tensor, statistics: Tensors) -> LossAndMetrics:
        log_ratio = lik.log_ratio("old")
        loss = -advantages * log_ratio.exp() + self.coefficient * statistics["held"] * log_ratio.abs()
        return loss, ratio_metrics(log_ratio) | covariance_metrics(statistics)


def covariance_metrics(statistics: Tensors) -> dict[str, Tensor]:
    """Return the statistics under the names of metrics."""
    return {"covariance/mean": statistics["covariance"], "covariance/held": statistics["held"]}


def get_number(share: float, mask: Tensor) -> int:
    """Return the number of decisions that are a share of all: rounded down, at least one."""
    return max(1, int(share * int(mask.sum())))


def check_share(share: float) -> None:
    """Raise ValueError unless the share is in (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected a number above 0 and at most 1")
