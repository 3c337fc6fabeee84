"""The clipped surrogate of a ratio with the same centre and spread at every decision: GRPO-Guard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from difrl.core.likelihoods import Likelihoods
from difrl.core.objectives.base import LossAndMetrics, Objective, Scope, Tensors
from difrl.core.objectives.clipped import check_bounds, narrower, ratio_metrics, surrogate

Bias = Literal["closed_form", "batch"]


@dataclass(frozen=True)
class RatioNormalised(Objective):
    """GRPO-Guard (2510.22319): Clipped, on the normalised ratio.

        log rho~ = scale (log rho + bias),    bias = E_old[-log rho] = KL(old || theta)
        L_ij = w max(-A rho~, -A clip(rho~, 1 - low, 1 + high))

    For two Gaussians of one std and x' = mean_old + std z, averaged over D dimensions,

        log rho  = (z . d / std - |d|^2 / (2 std^2)) / D,    d = mean_theta - mean_old
        log rho~ = z . d / D                                 with scale = std, bias = |d|^2 / (2 std^2 D)

    log rho has a mean below 0, so that it rarely reaches an upper bound, and a spread that grows as the noise of the step
    shrinks. log rho~ has mean 0 and spread |d| / D at every step. The bias carries its gradient. The paper also divides
    the loss of a step by |dt|, so that all steps have the same influence: that is the `weight` w of the likelihoods. At
    theta = old the gradient is -A w scale grad l.

    Attributes:
      low, high: bounds of rho~, as in Clipped.
      bias: "closed_form" takes the likelihoods' bias; "batch" takes the mean of -log rho over the samples of the step
        at each j, as a constant, for likelihoods without a closed form.

    Metrics: those of Clipped (ratio and approx_kl of rho itself); "ratio/normalised" (rho~).
    """

    low: float | None = 0.2
    high: float | None = 0.2
    bias: Bias = "closed_form"

    def __post_init__(self) -> None:
        check_bounds(self.low, self.high)
        if self.bias not in ("closed_form", "batch"):
            raise ValueError(f"bias is {self.bias!r}, expected 'closed_form' or 'batch'")

    @property
    def scope(self) -> Scope:
        return "row" if self.bias == "closed_form" else "batch"

    @property
    def needs(self) -> frozenset[str]:
        closed = {"bias"} if self.bias == "closed_form" else set()
        return frozenset({"references/old", "scale"} | closed)

    @property
    def clip_range(self) -> float:
        return narrower(self.low, self.high)

    def excursion(self, lik: Likelihoods) -> Tensor:
        """Return |ρ~ − 1|, [B, J], without the bias where it is that of a batch."""
        bias = lik["bias"] if self.bias == "closed_form" else 0.0
        return (lik["scale"] * (lik.log_ratio("old") + bias)).expm1().abs()

    def summarise(self, lik: Likelihoods) -> dict[str, Tensor]:
        return {} if self.bias == "closed_form" else {"bias": -lik.log_ratio("old").detach()}

    def statistics(self, rows: Tensors, mask: Tensor, advantages: Tensor, groups: Tensor) -> dict[str, Tensor]:
        count = mask.sum(0).clamp(min=1)
        return {name: ((value * mask).sum(0) / count).expand_as(value) for name, value in rows.items()}

    def loss_and_metrics(self, lik: Likelihoods, advantages: Tensor, statistics: Tensors) -> LossAndMetrics:
        bias = lik["bias"] if self.bias == "closed_form" else statistics["bias"]
        log_ratio = lik.log_ratio("old")
        normalised = (lik["scale"] * (log_ratio + bias)).exp()
        loss, clipping = surrogate(advantages, normalised, self.low, self.high)
        return loss, ratio_metrics(log_ratio) | clipping | {"ratio/normalised": normalised.detach()}
