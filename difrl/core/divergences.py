"""Divergences of the policy from an anchor.

Three choices determine the effect of a KL term: the estimator, its place in the reward or in the loss, and whether
it is taken per decision or per sample. They have different fixed points, which the docstrings give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from difrl.core.numerics import at_least_float32

Estimator = Callable[[Tensor, Tensor], Tensor]
"""(l_theta, l_ref) -> estimate of their divergence; any one shape, elementwise."""


def velocity(out: Tensor, ref: Tensor) -> Tensor:
    """Return ||out - ref||^2 averaged over the non-batch dimensions. [B, ...], [B, ...] -> [B], float32 at least.

    For a flow model at one t this is, up to a function of t, the rate at which the KL between the two paths grows
    (AWM, 2509.25050; DiffusionNFT, 2509.16117). It is exact, with gradient in out, and serves as a loss; ref is
    detached here.
    """
    if out.shape != ref.shape:
        raise ValueError(f"out has shape {list(out.shape)} and ref {list(ref.shape)}, expected one shape [B, ...]")
    return (at_least_float32(out) - at_least_float32(ref.detach())).square().flatten(1).mean(dim=1)


def k1(logp: Tensor, ref: Tensor) -> Tensor:
    """Return l_theta - l_ref, whose mean on samples of theta is KL(theta || ref). Any shape, elementwise.

    In the reward, summed over a sample and without division by a standard deviation, its fixed point is
    pi_ref exp(r / beta). As a loss it has no effect: its expected gradient is E[grad l_theta] = 0.
    """
    return logp - ref


def k2(logp: Tensor, ref: Tensor) -> Tensor:
    """Return (l_theta - l_ref)^2 / 2, which estimates KL(theta || ref) with a bias of third order. Elementwise.

    As a loss its expected gradient is that of KL(theta || ref) decision by decision, without the effect of a
    decision on later ones.
    """
    return (logp - ref).square() / 2.0


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """Return exp(u) - 1 - u, u = l_ref - l_theta: unbiased for KL(theta || ref), and >= 0. Any shape, elementwise.

    As a loss (GRPO, 2402.03300, eq. 4) its expected gradient is that of KL(ref || theta), not of the divergence
    that it estimates.
    """
    u = ref - logp
    return torch.expm1(u) - u


LOSS_ESTIMATORS: Mapping[str, Estimator] = MappingProxyType({"k2": k2, "k3": k3})
"""Estimators that may be a loss. k1 is none of them, because its expected gradient is 0."""
