"""The times at which a forward likelihood is evaluated: J stratified draws for each sample.

The quantile function of the density maps u_j, uniform in [j/J, (j+1)/J). So J draws cover the density evenly, and their
mean is an unbiased estimate of the mean over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from difrl.config import GridTimes, LogitNormalTimes, UniformTimes
from samplers import Grid

Quantile = Callable[[Tensor, Grid], Tensor]
Density = Callable[[Tensor], Tensor]


def stratified(uniforms: Tensor) -> Tensor:
    """Move u [B, J], uniform in [0, 1), into the J strata."""
    j = torch.arange(uniforms.shape[1], dtype=uniforms.dtype, device=uniforms.device)
    return (j + uniforms) / uniforms.shape[1]


def grid_quantile(config: GridTimes, u: Tensor, grid: Grid) -> Tensor:
    """Return times at which the sampler evaluates the model, each equally likely, the first excepted.

    They are those of steps 1 .. floor(fraction N) - 1 of N, as AWM counts them (arXiv:2509.25050): at 0.9 of 14 steps, 11
    times. Step 1 is always among them.
    """
    end = math.floor(config.fraction * grid.steps + 1e-9)  # 0.29 * 100 is a little below 29
    candidates = grid.times[1 : max(2, end)].to(u.device)
    return candidates[(u * len(candidates)).long().clamp(max=len(candidates) - 1)]


def uniform_quantile(config: UniformTimes, u: Tensor, grid: Grid) -> Tensor:
    """Return low + (high − low) u."""
    return config.low + (config.high - config.low) * u.double()


def logit_normal_quantile(config: LogitNormalTimes, u: Tensor, grid: Grid) -> Tensor:
    """Return shift τ / (1 + (shift − 1) τ) with τ = sigmoid(mean + std Φ⁻¹(u))."""
    # Φ⁻¹ is infinite at 0 and 1; the clamp moves a draw that has probability 1e-6.
    normal = torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))
    tau = torch.sigmoid(config.mean + config.std * normal)
    return config.shift * tau / (1 + (config.shift - 1) * tau)


def uniform_density(config: UniformTimes, t: Tensor) -> Tensor:
    """Return 1 / (high − low)."""
    return torch.full_like(t, 1 / (config.high - config.low))


def logit_normal_density(config: LogitNormalTimes, t: Tensor) -> Tensor:
    """Return the density of the shifted logit-normal: N(logit τ; mean, std²) / (τ (1 − τ)) · dτ/dt."""
    tau = t / (config.shift - (config.shift - 1) * t)
    normal = torch.distributions.Normal(config.mean, config.std)
    slope = config.shift / (config.shift - (config.shift - 1) * t) ** 2
    density: Tensor = normal.log_prob(torch.logit(tau)).exp() / (tau * (1 - tau)) * slope
    return density


def build_quantile(config: GridTimes | UniformTimes | LogitNormalTimes) -> Quantile:
    """Build the quantile function of a times section."""
    match config:
        case GridTimes():
            return lambda u, grid: grid_quantile(config, u, grid)
        case UniformTimes():
            return lambda u, grid: uniform_quantile(config, u, grid)
        case LogitNormalTimes():
            return lambda u, grid: logit_normal_quantile(config, u, grid)


def build_density(config: GridTimes | UniformTimes | LogitNormalTimes) -> Density:
    """Build the density of a times section. Raise ValueError for a grid, which has none."""
    match config:
        case UniformTimes():
            return lambda t: uniform_density(config, t)
        case LogitNormalTimes():
            return lambda t: logit_normal_density(config, t)
        case GridTimes():
            raise ValueError(
                "weighting: elbo divides by the density of the times, and times on a grid have none; "
                "set likelihood.times.kind to uniform or logit_normal"
            )
