"""Supervised learning from good and bad samples: DiffusionNFT."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from difrl.core.likelihoods import Likelihoods
from difrl.core.numerics import check_bound, to_unit_interval
from difrl.core.objectives.base import LossAndMetrics, Objective, Tensors
from difrl.core.objectives.clipped import ratio_metrics


@dataclass(frozen=True)
class NegativeAware(Objective):
    """DiffusionNFT (2509.16117): an output mixed towards theta fits good samples, one mixed away from it bad ones.

        L_ij = (a / b) (-r l+ - (1 - r) l-),    r = clip(A, -a, a) / (2 a) + 1/2
        l+, l-: the likelihoods under b out_theta + (1 - b) out_old and (1 + b) out_old - b out_theta

    The factor a / b makes the gradient at theta = old exactly -A grad l for |A| <= a, since there the two mixtures
    move by +b and -b times the movement of out_theta.

    Attributes:
      mix: b, the mixing factor of the likelihoods.
      bound: a.

    Metrics: ratio and approx_kl of theta itself; "negative/plus" and "negative/minus" (-l+ and -l-).
    """

    mix: float = 1.0
    bound: float = 5.0

    needs = frozenset({"mixed/plus", "mixed/minus", "references/old"})

    def __post_init__(self) -> None:
        check_bound(self.bound)
        if not self.mix > 0:
            raise ValueError(f"mix is {self.mix}, expected the mixing factor b > 0 of the likelihoods")

    def loss_and_metrics(self, lik: Likelihoods, advantages: Tensor, statistics: Tensors) -> LossAndMetrics:
        r = to_unit_interval(advantages, self.bound)
        plus, minus = -lik["mixed/plus"], -lik["mixed/minus"]
        loss = self.bound / self.mix * (r * plus + (1.0 - r) * minus)
        losses = {"negative/plus": plus.detach(), "negative/minus": minus.detach()}
        return loss, ratio_metrics(lik.log_ratio("old")) | losses
