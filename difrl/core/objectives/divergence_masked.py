"""The policy gradient without the decisions that would lead further out of a trust region: Flow-DPPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difrl.core.likelihoods import Likelihoods
from difrl.core.objectives.base import LossAndMetrics, Objective, Tensors
from difrl.core.objectives.clipped import ratio_metrics


@dataclass(frozen=True)
class DivergenceMasked(Objective):
    """Flow-DPPO (2606.11025): a trust region in the exact KL, not in a ratio that estimates it from one sample.

        L_ij = -A rho, and 0 where KL(old || theta) >= delta and (A > 0 and rho > 1, or A < 0 and rho < 1)

    A decision that leads back towards old is kept, however far theta is from old. At theta = old the gradient is
    -A grad l.

    Attributes:
      delta: size of the trust region, a KL in the reduction of l.

    Metrics: ratio; approx_kl; "trust/kl" (the exact KL); "trust/dropped" (1 where the loss was dropped).
    """

    delta: float = 1e-5

    needs = frozenset({"references/old", "bias"})

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"delta is {self.delta}, expected a divergence above 0")

    @property
    def clip_range(self) -> float:
        return self.delta

    def excursion(self, lik: Likelihoods) -> Tensor:
        """Return KL(old || theta), [B, J]."""
        return lik["bias"]

    def loss_and_metrics(self, lik: Likelihoods, advantages: Tensor, statistics: Tensors) -> LossAndMetrics:
        log_ratio, kl = lik.log_ratio("old"), lik["bias"].detach()
        away = ((advantages > 0) & (log_ratio > 0)) | ((advantages < 0) & (log_ratio < 0))
        dropped = away & (kl >= self.delta)
        loss = torch.where(dropped, 0.0, -advantages * log_ratio.exp())
        metrics = {"trust/kl": kl, "trust/dropped": dropped.to(kl.dtype)}
        return loss, ratio_metrics(log_ratio) | metrics
