"""Numerical helpers of the core."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32 at least: half precisions are raised, float64 is kept.

    A copy of `samplers.at_least_float32`, because the core imports nothing but torch.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_unit_interval(advantages: Tensor, bound: float) -> Tensor:
    """Map advantages to [0, 1], read as the probability that a sample is good. Any shape, elementwise.

    clip(A, -a, a) / (2 a) + 1/2,  a = bound > 0 (DiffusionNFT, 2509.16117; CRD, 2603.14128)
    """
    return advantages.clamp(-bound, bound) / (2.0 * bound) + 0.5


def check_bound(bound: float) -> None:
    """Raise ValueError unless the bound of `to_unit_interval` is positive."""
    if not bound > 0:
        raise ValueError(f"bound is {bound}, expected a positive number: advantages are clipped to +- this")
