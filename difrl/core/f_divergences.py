"""The f-divergences between two distributions over finitely many elements.

    D_f(theta || ref) = sum_v ref_v f(u_v),    u = theta / ref,    f convex, f(1) = f'(1) = 0

so that every term is >= 0. Each is exact over a whole distribution (`full`), or estimated from the log-ratios of
elements drawn from theta (`estimate_from_policy_samples`) or from the reference (`estimate_from_reference_samples`).
All statements here hold at one decision: where decisions depend on earlier ones, no estimator at a single decision
includes its effect on later ones. For forward KL alone, the sum over decisions with prefixes drawn from the reference
is the divergence of whole sequences (the chain rule).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from difrl.core.divergences import k3
from difrl.core.numerics import at_least_float32

ElementwiseFunction = Callable[[Tensor], Tensor]
"""A function of u > 0, elementwise, given log u."""


@dataclass(frozen=True)
class FDivergence:
    """An f-divergence. Every function takes delta = log u = log theta - log ref.

    Attributes:
      generator: f(u); must not overflow for u <= 1.
      perspective: f(u) / u; must not overflow for u >= 1.
      slope: f'(u).
      at_zero: f(0), the cost of an element with probability 0 under theta. Infinite: theta must cover the reference.
      at_infinity: f'(infinity), the cost of an element with probability 0 under the reference. Infinite: theta must stay
        inside the support of the reference.
    """

    generator: ElementwiseFunction
    perspective: ElementwiseFunction
    slope: ElementwiseFunction
    at_zero: float
    at_infinity: float

    def full(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return the exact D_f(p || q), with gradient in log_p. [..., V], [..., V] -> [...], float32 at least.

        Terms are p f(u) / u where p > q and q f(u) elsewhere, so that neither overflows.

        Args:
          log_p, log_q: normalised over the last dimension; -inf for an element of probability 0. q is the reference,
            detached by the caller.
        """
        if log_p.shape != log_q.shape:
            raise ValueError(
                f"log_p has shape {list(log_p.shape)} and log_q {list(log_q.shape)}, expected one [..., V]: both over "
                "the same elements"
            )
        log_p, log_q = at_least_float32(log_p), at_least_float32(log_q)
        p, q, in_p, in_q = log_p.exp(), log_q.exp(), log_p > -math.inf, log_q > -math.inf
        delta = torch.where(in_p & in_q, log_p - log_q, 0.0)
        more, less = p * self.perspective(delta.clamp(min=0)), q * self.generator(delta.clamp(max=0))
        terms = torch.where(in_p & in_q, torch.where(delta > 0, more, less), 0.0)
        dropped, added = _scaled(in_q & ~in_p, q, self.at_zero), _scaled(in_p & ~in_q, p, self.at_infinity)
        return (terms + dropped + added).sum(dim=-1)

    def estimate_from_policy_samples(self, delta: Tensor) -> Tensor:
        """Estimate D_f from elements drawn from theta: value f(u) / u, derivative f'(u) in delta. Any shape, elementwise.

        The mean of the value is D_f (where theta covers the reference), and the mean of the gradient is that of D_f:
        grad D_f = sum_v f'(u_v) grad theta_v = E_theta[f'(u) grad log theta] (f-DPG, 2302.08215). Value and derivative
        belong to different functions of delta, so the value is detached. Reverse KL has the value of k3 and the gradient
        of k2, forward KL the gradient of k3.
        """
        fixed = delta.detach()
        return self.perspective(fixed) + self.slope(fixed) * (delta - fixed)

    def estimate_from_reference_samples(self, delta: Tensor) -> Tensor:
        """Estimate D_f from elements drawn from the reference: f(u), with its own gradient. Any shape, elementwise.

        The mean of the value is D_f and the mean of the gradient is that of D_f, since the sampling does not depend on
        theta (DPH-RL, 2509.07430, for forward KL and Jensen-Shannon). Forward KL is often written -log u. The term u - 1,
        of mean 0, makes the gradient (u - 1) grad log theta vanish at theta = ref sample by sample.
        """
        return self.generator(delta)


def _scaled(selected: Tensor, mass: Tensor, factor: float) -> Tensor:
    """Return mass * factor where selected, else 0. An infinite factor leaves no NaN in the gradient of the others."""
    return torch.where(selected, torch.where(selected, mass, 1.0) * factor, 0.0)


def _forward(delta: Tensor) -> Tensor:
    """u - 1 - log u."""
    return k3(-delta, torch.zeros_like(delta))


def _reverse(delta: Tensor) -> Tensor:
    """u log u - u + 1."""
    return delta.exp() * delta - torch.expm1(delta)


def _shannon(delta: Tensor) -> Tensor:
    """u log u - (1 + u) log((1 + u) / 2)."""
    u = delta.exp()
    return u * delta - (1 + u) * (F.softplus(delta) - math.log(2.0))


def _mirrored(curve: ElementwiseFunction) -> ElementwiseFunction:
    """Return f(1 / u). A divergence's perspective is the generator of the one with theta and ref exchanged, at 1 / u."""
    return lambda delta: curve(-delta)


REVERSE_KL = FDivergence(
    generator=_reverse,
    perspective=_mirrored(_forward),
    slope=lambda delta: delta,
    at_zero=1.0,
    at_infinity=math.inf,
)
"""KL(theta || ref), f = u log u - u + 1: mode-seeking, it may drop elements of the reference."""

FORWARD_KL = FDivergence(
    generator=_forward,
    perspective=_mirrored(_reverse),
    slope=lambda delta: -torch.expm1(-delta),
    at_zero=math.inf,
    at_infinity=1.0,
)
"""KL(ref || theta), f = u - 1 - log u: mass-covering."""

JENSEN_SHANNON = FDivergence(
    generator=_shannon,
    perspective=_mirrored(_shannon),
    slope=lambda delta: F.logsigmoid(delta) + math.log(2.0),
    at_zero=math.log(2.0),
    at_infinity=math.log(2.0),
)
"""KL(theta || m) + KL(ref || m), m = (theta + ref) / 2: at most 2 log 2, twice the definition with factors 1/2.
f' is that of f-DPO (2309.16240) and f-DPG (2302.08215)."""

HELLINGER = FDivergence(
    generator=lambda delta: torch.expm1(delta / 2).square() / 2,
    perspective=lambda delta: torch.expm1(-delta / 2).square() / 2,
    slope=lambda delta: -torch.expm1(-delta / 2) / 2,
    at_zero=0.5,
    at_infinity=0.5,
)
"""Squared Hellinger distance: sum_v (sqrt theta - sqrt ref)^2 / 2 = 1 - sum_v sqrt(theta ref), at most 1."""

TOTAL_VARIATION = FDivergence(
    generator=lambda delta: torch.expm1(delta).abs() / 2,
    perspective=lambda delta: torch.expm1(-delta).abs() / 2,
    slope=lambda delta: delta.sign() / 2,
    at_zero=0.5,
    at_infinity=0.5,
)
"""sum_v |theta - ref| / 2, at most 1. At theta = ref, where f has no derivative, the slope is 0."""

CHI_SQUARED = FDivergence(
    generator=lambda delta: torch.expm1(delta).square(),
    perspective=lambda delta: torch.expm1(delta) + torch.expm1(-delta),
    slope=lambda delta: 2.0 * torch.expm1(delta),
    at_zero=1.0,
    at_infinity=math.inf,
)
"""sum_v (theta - ref)^2 / ref = E_theta[u] - 1 (2403.03185): grows with the ratio itself, not with its log."""


def alpha_divergence(alpha: float) -> FDivergence:
    """Return the alpha-divergence: f = (u^(1 - alpha) - (1 - alpha) u - alpha) / (alpha (alpha - 1)).

    f' = (1 - u^-alpha) / alpha (f-DPO, 2309.16240). alpha = 1 is forward KL, 0 reverse KL, 1/2 four times the squared
    Hellinger distance, -1 half of chi squared.
    """
    if alpha in (0.0, 1.0):
        return FORWARD_KL if alpha else REVERSE_KL

    def curve(a: float) -> ElementwiseFunction:
        return lambda delta: (torch.expm1(delta) - torch.expm1((1.0 - a) * delta) / (1.0 - a)) / a

    return FDivergence(
        generator=curve(alpha),
        perspective=_mirrored(curve(1.0 - alpha)),
        slope=lambda delta: -torch.expm1(-alpha * delta) / alpha,
        at_zero=1.0 / (1.0 - alpha) if alpha < 1 else math.inf,
        at_infinity=1.0 / alpha if alpha > 0 else math.inf,
    )


F_DIVERGENCES: Mapping[str, Callable[[float], FDivergence]] = MappingProxyType(
    {
        "reverse_kl": lambda alpha: REVERSE_KL,
        "forward_kl": lambda alpha: FORWARD_KL,
        "jensen_shannon": lambda alpha: JENSEN_SHANNON,
        "alpha": alpha_divergence,
        "hellinger": lambda alpha: HELLINGER,
        "total_variation": lambda alpha: TOTAL_VARIATION,
        "chi_squared": lambda alpha: CHI_SQUARED,
    }
)
"""Name -> the divergence at an alpha, on which only "alpha" depends."""


def f_divergence(name: str, alpha: float = 0.5) -> FDivergence:
    """Return a divergence by name. Only "alpha" depends on alpha."""
    if name not in F_DIVERGENCES:
        raise ValueError(f"no f-divergence {name!r}, expected one of {sorted(F_DIVERGENCES)}")
    return F_DIVERGENCES[name](alpha)
