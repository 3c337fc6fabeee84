"""Forward likelihoods: the pretraining loss of a clean sample at a drawn (t, noise), used as a log-likelihood.

    l = -w(t) m,    m = ||out - target||^2 averaged over the non-batch dimensions

`out` and `target` are the model's raw output and its training target, or clean-sample estimates; the same for the
policy and every reference. All weightings but `elbo` are surrogates: their gradient times A is the policy gradient of
the surrogate, not of log pi.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from difrl.core.numerics import at_least_float32

HUBER_EPS = 1e-10
GHUBER_POWER = 0.25
ADAPTIVE_FLOOR = 1e-5

Weighting = Callable[[Tensor, Tensor], Tensor]
"""(error = out - target [B, ...], t [B]) -> l [B]."""


def uniform(error: Tensor, t: Tensor) -> Tensor:
    """-m."""
    return -_mean_square(error)


def by_t(error: Tensor, t: Tensor) -> Tensor:
    """-t m."""
    return -t * _mean_square(error)


def by_t2(error: Tensor, t: Tensor) -> Tensor:
    """-t^2 m: for flow matching, the squared error of the clean sample."""
    return -t.square() * _mean_square(error)


def huber(error: Tensor, t: Tensor) -> Tensor:
    """-t (sqrt(m + 1e-10) - 1e-5): the root of m, smoothed, with value 0 at m = 0 (AWM, 2509.25050)."""
    return -t * ((_mean_square(error) + HUBER_EPS).sqrt() - math.sqrt(HUBER_EPS))


def ghuber(error: Tensor, t: Tensor) -> Tensor:
    """-(t / p) ((m + 1e-10)^p - 1e-10^p), p = 1/4 (AWM, 2509.25050). With p = 1/2 it would be twice `huber`."""
    m = _mean_square(error) + HUBER_EPS
    return -(t / GHUBER_POWER) * (m**GHUBER_POWER - math.pow(HUBER_EPS, GHUBER_POWER))


def adaptive(error: Tensor, t: Tensor) -> Tensor:
    """-m / max(sg(mean |out - target|), 1e-5): m relative to the size of the error (DiffusionNFT, 2509.16117)."""
    size = error.detach().abs().flatten(1).mean(dim=1)
    return -_mean_square(error) / size.clamp(min=ADAPTIVE_FLOOR)


def elbo(eps: Tensor, eps_hat: Tensor, t: Tensor, log_snr_rate: Tensor, density: Tensor, cutoff: float) -> Tensor:
    """Return -1/2 (-dlambda/dt) ||eps - eps_hat||^2 / p(t), summed over dimensions, and 0 where t < cutoff.

    Its mean over t ~ p and eps is the variational bound of log pi up to a constant (VDM, 2107.00630), restricted to
    the noise levels above the cutoff. For flow matching it equals -((1 - t) / t) ||v_hat - v||^2 / p(t). There the rate
    is infinite at t = 1: draw t below 1.

    Args:
      eps, eps_hat: the drawn noise and its estimate, [B, ...].
      t: [B].
      log_snr_rate: -dlambda/dt >= 0 of the process at t, [B], lambda = log(alpha^2 / sigma^2).
      density: p(t) of the drawn times, [B].
      cutoff: smallest t with any weight.

    Returns:
      [B].
    """
    total = (at_least_float32(eps_hat) - at_least_float32(eps)).square().flatten(1).sum(dim=1)
    # The cutoff acts on the factor, not the product: an infinite rate would make a zero gradient NaN.
    factor = torch.where(t >= cutoff, 0.5 * log_snr_rate / density, 0.0)
    return -factor.to(total.dtype) * total


WEIGHTINGS: Mapping[str, Weighting] = MappingProxyType(
    {"uniform": uniform, "t": by_t, "t2": by_t2, "huber": huber, "ghuber": ghuber, "adaptive": adaptive}
)


def forward_logp(out: Tensor, target: Tensor, t: Tensor, weighting: str) -> Tensor:
    """Return the forward log-likelihood under a weighting of WEIGHTINGS, [B], averaged over dimensions.

    Args:
      out, target: [B, ...]; float16 and bfloat16 are raised to float32 before subtracting.
      t: [B], from 1 (noise) to 0 (data).
      weighting: name of the weighting.
    """
    if out.shape != target.shape or t.shape != out.shape[:1]:
        shapes = [list(x.shape) for x in (out, target, t)]
        raise ValueError(
            f"out, target, t have shapes {shapes}, expected out and target of one shape [B, ...], and t [B]"
        )
    if weighting not in WEIGHTINGS:
        raise ValueError(f"no weighting {weighting!r}, expected one of {sorted(WEIGHTINGS)}; for the bound use `elbo`")
    error = at_least_float32(out) - at_least_float32(target)
    return WEIGHTINGS[weighting](error, t.to(error.dtype))


def _mean_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(dim=1)
