"""How far the policy is from an anchor.

Three things decide what a KL term does: the estimator, whether it is part of the reward or of the loss, and
whether it is taken per decision or per sample. They have different fixed points; each function says its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from difrl.core.numerics import raised

Place = Literal["loss", "reward"]
Estimator = Callable[[Tensor, Tensor], Tensor]


def velocity(out: Tensor, ref: Tensor) -> Tensor:
    """||out - ref||^2 averaged over the non-batch dimensions. [B, ...], [B, ...] -> [B], float32 at least.

    For a flow model at one t this is, up to a factor of t, the rate at which KL between the two paths grows
    (AWM, 2509.25050; DiffusionNFT, 2509.16117). Exact, with gradient in out. As a loss; ref is detached here.
    """
    if out.shape != ref.shape:
        raise ValueError(f"out has shape {list(out.shape)} and ref {list(ref.shape)}, expected one shape [B, ...]")
    return (raised(out) - raised(ref.detach())).square().flatten(1).mean(dim=1)


def k1(logp: Tensor, ref: Tensor) -> Tensor:
    """l_theta - l_ref: on samples of theta its mean is KL(theta || ref). Any shape, elementwise.

    In the reward, summed over a sample and without a division by a standard deviation, its fixed point is
    pi_ref exp(r / beta). As a loss its expected gradient is E[grad l_theta] = 0: it does nothing, and is
    refused.
    """
    return logp - ref


def k2(logp: Tensor, ref: Tensor) -> Tensor:
    """(l_theta - l_ref)^2 / 2: biased for KL(theta || ref), equal to second order. Any shape, elementwise.

    As a loss its expected gradient is that of KL(theta || ref) decision by decision, without the effect of a
    decision on the ones after it.
    """
    return (logp - ref).square() / 2.0


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """exp(u) - 1 - u, u = l_ref - l_theta: unbiased for KL(theta || ref), and >= 0. Any shape, elementwise.

    As a loss (GRPO, 2402.03300, eq. 4) its expected gradient is that of KL(ref || theta), not of what it
    estimates.
    """
    u = ref - logp
    return torch.expm1(u) - u


ESTIMATORS: Mapping[str, Estimator] = MappingProxyType({"k1": k1, "k2": k2, "k3": k3})


def estimator(name: str, place: Place) -> Estimator:
    """An estimator by name, for use in the "loss" or in the "reward"; k1 as a loss is refused."""
    if name not in ESTIMATORS:
        raise ValueError(f"no KL estimator {name!r}, expected one of {sorted(ESTIMATORS)}")
    if name == "k1" and place == "loss":
        raise ValueError(
            "k1 as a loss has zero expected gradient, so it would hold nothing; put k1 in the reward, or use "
            "k2 (the gradient of KL(theta || ref)) or k3 (that of KL(ref || theta)) in the loss"
        )
    return ESTIMATORS[name]
