"""The clipped surrogate, with a bound for each side."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from difrl.core.likelihoods import Likelihoods
from difrl.core.objectives.base import LossAndMetrics, Objective, Tensors


@dataclass(frozen=True)
class Clipped(Objective):
    """The clipped surrogate of PPO (1707.06347, eq. 7), with a bound for each side.

        L_ij = max(-A rho, -A clip(rho, 1 - low, 1 + high)),    rho = exp(l_theta - l_old)
        L_ij = min(L_ij, -A dual)  where A < 0                  dual-clip PPO (1912.09729, eq. 5)

    low = high is PPO and GRPO (2402.03300); high > low is DAPO's clip-higher (2503.14476); both infinite is
    the importance-weighted policy gradient; decisions = "mean" is GSPO's sequence ratio (2507.18071). At
    theta = old the gradient is -A grad l. A published range is valid for the published reduction of l: the ratio
    for log-likelihoods averaged over d dimensions is the d-th root of the true one.

    Attributes:
      low: the gradient stops where A < 0 and rho < 1 - low. None or inf: no bound.
      high: the gradient stops where A > 0 and rho > 1 + high. None or inf: no bound.
      dual: the gradient stops where A < 0 and rho > dual > 1, where the loss would grow with rho. None: no bound.

    Metrics: ratio (rho); clip_high (1 where A > 0 and rho > 1 + high); clip_low (1 where A < 0 and rho < 1 - low);
    with dual, clip_dual (1 where A < 0 and rho > dual); approx_kl (rho - 1 - log rho, whose mean over samples of old is
    KL(old || theta)).
    """

    low: float | None = 0.2
    high: float | None = 0.2
    dual: float | None = None

    def __post_init__(self) -> None:
        check_bounds(self.low, self.high)
        if self.dual is not None and not self.dual > 1.0:
            raise ValueError(f"dual is {self.dual}, expected a ratio above 1, or None for no bound")

    @property
    def clip_range(self) -> float:
        return narrower(self.low, self.high, None if self.dual is None else self.dual - 1.0)

    def loss_and_metrics(self, lik: Likelihoods, advantages: Tensor, statistics: Tensors) -> LossAndMetrics:
        log_ratio = lik.log_ratio("old")
        ratio = log_ratio.exp()
        loss, clipping = surrogate(advantages, ratio, self.low, self.high)
        if self.dual is not None:
            beyond = (advantages < 0) & (ratio > self.dual)
            loss = torch.where(beyond, -advantages * self.dual, loss)
            clipping["clip_dual"] = beyond.to(ratio.dtype)
        return loss, ratio_metrics(log_ratio) | clipping


def surrogate(a: Tensor, ratio: Tensor, low: float | None, high: float | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return max(-a ratio, -a clip(ratio, 1 - low, 1 + high)), and metrics of where it is clipped. Any shape."""
    lower = 1.0 - (math.inf if low is None else low)
    upper = 1.0 + (math.inf if high is None else high)
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(lower, upper))
    return loss, {
        "clip_high": ((a > 0) & (ratio > upper)).to(ratio.dtype),
        "clip_low": ((a < 0) & (ratio < lower)).to(ratio.dtype),
    }


def narrower(*bounds: float | None) -> float:
    """Return the narrowest of some bounds of a ratio; 1, its own size, if all are wider or absent."""
    return min(1.0, *(1.0 if bound is None else bound for bound in bounds))


def ratio_metrics(log_ratio: Tensor) -> dict[str, Tensor]:
    """Return ratio and approx_kl = rho - 1 - log rho of a log ratio to old, detached."""
    log_ratio = log_ratio.detach()
    return {"ratio": log_ratio.exp(), "approx_kl": log_ratio.expm1() - log_ratio}


def check_bounds(low: float | None, high: float | None) -> None:
    """Raise ValueError unless both are numbers >= 0, or None for no bound."""
    for name, bound in (("low", low), ("high", high)):
        if bound is not None and not bound >= 0.0:
            raise ValueError(f"clip {name} is {bound}, expected a number >= 0, or None for no bound")
