"""Closed forms of the Gaussian task: the distribution at the end of a sampler, and the fixed point of each kind of training.

Every transition is affine, x_next = M x_t + c + std z, so the end of a chain is Gaussian. The noise of step j enters the
reward a·x0 through P_jᵀ a, where P_j is the product of the matrices M of the steps after it.

* The optimum. N(mean, Σ) tilted by exp(a·x0/β) is N(mean + Σa/β, Σ).
* The optimum over chains. Maximise E[a·x0] − β Σ_j KL(step j ‖ step j of the base) over the means of the noisy steps. Backwards
  from V(x0) = a·x0 the value stays linear, V_j(x) = (P_j M_j)ᵀa·x + const, so the best shift of a mean is std_j² P_jᵀa/β
  for every state. The end moves by Σ_j std_j² P_j P_jᵀ a/β = Cov(x0 | x_1) a/β. This is the tilt of the chain's own end only
  for a memoryless chain, whose end does not depend on the noise that it starts from.
* The forward process. At time t A-weighted matching is a regression that moves the mean of the denoiser by
  (w_t / c_t) Cov(x0) a, where w_t is the weight of the likelihood and c_t that of the anchor: π* if w_t / c_t is constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplers import Grid, Kernel, Process, Window, ode

Array = NDArray[np.float64]
ExactDenoiser = Callable[[Tensor, Tensor], Tensor]
"""A denoiser for one prompt: states [B, D], times [B] -> raw outputs [B, D]."""


@dataclass(frozen=True)
class Normal:
    """N(mean [D], cov [D, D])."""

    mean: Array
    cov: Array

    def tilted(self, direction: Array, beta: float) -> Normal:
        """Return the distribution ∝ N(mean, cov) exp(direction · x / β)."""
        return replace(self, mean=self.mean + self.cov @ direction / beta)

    def kl(self, other: Normal) -> float:
        """Return KL(self ‖ other) in nats."""
        inverse = np.linalg.inv(other.cov)
        gap = other.mean - self.mean
        logdets = np.linalg.slogdet(other.cov)[1] - np.linalg.slogdet(self.cov)[1]
        return float(np.trace(inverse @ self.cov) - len(gap) + gap @ inverse @ gap + logdets) / 2


@dataclass(frozen=True)
class Chain:
    """x_{j+1} = matrices_j x_j + offsets_j + stds_j z_j from x_0 ~ N(0, I): [N, D, D], [N, D], [N]."""

    matrices: Array
    offsets: Array
    stds: Array

    def end(self) -> Normal:
        """Return the distribution of the last state."""
        mean, cov = np.zeros(self.offsets.shape[1]), np.eye(self.offsets.shape[1])
        for matrix, offset, std in zip(self.matrices, self.offsets, self.stds, strict=True):
            mean, cov = matrix @ mean + offset, matrix @ cov @ matrix.T + std**2 * np.eye(len(mean))
        return Normal(mean, cov)

    def propagators(self) -> Array:
        """Return P [N, D, D]: P_j maps a change of the state after step j to the change of the last state."""
        products = [np.eye(self.offsets.shape[1])]
        for matrix in self.matrices[:0:-1]:
            products.append(products[-1] @ matrix)
        return np.array(products[::-1])

    def with_control(self, direction: Array, weights: Array) -> Chain:
        """Return the chain with the mean of step j moved by weights_j std_j² P_jᵀ direction. The optimum has weights 1/β."""
        shifts = (weights * self.stds**2)[:, None] * np.einsum("nij,i->nj", self.propagators(), direction)
        return replace(self, offsets=self.offsets + shifts)

    def initial_variance_share(self) -> float:
        """Return the share of the last state's variance that comes from the first state: 0 for a memoryless chain."""
        through = self.propagators()[0] @ self.matrices[0]
        return float(np.trace(through @ through.T) / np.trace(self.end().cov))


def probe_chain(
    output: ExactDenoiser, process: Process, grid: Grid, kernel: Kernel, window: Window, dimensions: int
) -> Chain:
    """Return the chain that samplers.rollout runs with an affine denoiser, by probing it at the origin and unit vectors."""
    probes = torch.cat([torch.zeros(1, dimensions), torch.eye(dimensions)]).double()
    matrices, offsets, stds = [], [], []
    for step in range(grid.steps):
        t, s = (grid.times[i].expand(dimensions + 1) for i in (step, step + 1))
        use = kernel if step in window else ode
        mean, std = use(process, output(probes, t).double(), probes, t, s)
        offsets.append(mean[0].numpy())
        matrices.append((mean[1:] - mean[0]).T.numpy())
        stds.append(float(std.flatten()[0]))
    return Chain(np.array(matrices), np.array(offsets), np.array(stds))


def build_exact_denoiser(process: Process, cov: Array, mean: Callable[[Tensor], Tensor]) -> ExactDenoiser:
    """Return the float64 denoiser that is exact for N(mean(t), cov), with a mean [B, D] for each time t [B]."""
    covariance = torch.from_numpy(cov)
    eye = torch.eye(len(cov), dtype=torch.float64)

    def output(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        marginal = alpha[..., None] ** 2 * covariance + sigma[..., None] ** 2 * eye
        white = torch.linalg.solve(marginal, (x_t - alpha * mean(t))[..., None])[..., 0]
        return process.combine(mean(t) + alpha * white @ covariance, sigma * white, t)

    return output


def constant_mean(mean: Array) -> Callable[[Tensor], Tensor]:
    """Return the same mean at every time, for `build_exact_denoiser`."""
    return lambda t: torch.from_numpy(mean).expand(len(t), -1)


def interpolated_mean(times: Array, means: Array) -> Callable[[Tensor], Tensor]:
    """Interpolate a table of means [K, D] at rising times [K] linearly, constant beyond, for `build_exact_denoiser`."""
    return lambda t: torch.from_numpy(np.stack([np.interp(t.numpy(), times, column) for column in means.T], axis=1))
