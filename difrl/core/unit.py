"""Advantages as rewards in [0, 1], for the objectives that read them as the probability of being good."""

from __future__ import annotations

from torch import Tensor


def unit(advantages: Tensor, bound: float) -> Tensor:
    """clip(A, -a, a) / (2 a) + 1/2 (DiffusionNFT, 2509.16117; CRD, 2603.14128). Any shape, a = bound > 0."""
    return advantages.clamp(-bound, bound) / (2.0 * bound) + 0.5


def check_bound(bound: float) -> None:
    """Raise ValueError unless the bound is positive."""
    if not bound > 0:
        raise ValueError(f"bound is {bound}, expected a positive number: advantages are clipped to +- this")
