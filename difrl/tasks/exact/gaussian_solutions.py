"""What is known of the Gaussian world in closed form: where samplers end, and what each kind of training tends to.

All of it follows from one remark. Every transition is affine, x_next = M x_t + c + std z, so the end of a chain is
Gaussian, and its reward a·x0 feels the noise of step j through P_j a, P_j the product of the matrices M after it.

* The optimum. N(mean, Σ) tilted by exp(a·x0/β) is N(mean + Σa/β, Σ).
* A chain. Maximise E[a·x0] − β Σ_j KL(step j ‖ step j of the base) over the means of the noisy steps. Backwards from
  V(x0) = a·x0 the value stays linear, V_j(x) = (P_j M_j)ᵀa·x + const, so the best shift of a mean is std_j² P_jᵀa/β
  whatever the state. The end moves by Σ_j std_j² P_j P_jᵀ a/β = Cov(x0 | x_1) a/β: all of the chain's covariance, and
  so its own tilt, only where the noise that a run starts from is forgotten (a memoryless chain).
* The forward process. At time t the regression that A-weighted matching solves moves the mean the denoiser believes in
  by (w_t / c_t) Cov(x0) a, where w_t weighs the likelihood and c_t the anchor: π* where their quotient is constant.
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
Output = Callable[[Tensor, Tensor], Tensor]
"""A denoiser for one prompt: states [B, D], times [B] -> raw outputs [B, D]."""


@dataclass(frozen=True)
class Normal:
    """N(mean [D], cov [D, D])."""

    mean: Array
    cov: Array

    def tilted(self, direction: Array, beta: float) -> Normal:
        """∝ N(mean, cov) exp(direction · x / β)."""
        return replace(self, mean=self.mean + self.cov @ direction / beta)

    def kl(self, other: Normal) -> float:
        """KL(self ‖ other) in nats."""
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
        """The law of the last state."""
        mean, cov = np.zeros(self.offsets.shape[1]), np.eye(self.offsets.shape[1])
        for matrix, offset, std in zip(self.matrices, self.offsets, self.stds, strict=True):
            mean, cov = matrix @ mean + offset, matrix @ cov @ matrix.T + std**2 * np.eye(len(mean))
        return Normal(mean, cov)

    def to_end(self) -> Array:
        """P [N, D, D]: what a change of the state after step j becomes at the end."""
        products = [np.eye(self.offsets.shape[1])]
        for matrix in self.matrices[:0:-1]:
            products.append(products[-1] @ matrix)
        return np.array(products[::-1])

    def controlled(self, direction: Array, weights: Array) -> Chain:
        """With each noisy step's mean moved by weights_j std_j² P_jᵀ direction; the path optimum has weights 1/β."""
        shifts = (weights * self.stds**2)[:, None] * np.einsum("nij,i->nj", self.to_end(), direction)
        return replace(self, offsets=self.offsets + shifts)

    def remembered(self) -> float:
        """The share of the end's variance that comes from the first state: 0 for a memoryless chain."""
        through = self.to_end()[0] @ self.matrices[0]
        return float(np.trace(through @ through.T) / np.trace(self.end().cov))


def chain_of(output: Output, process: Process, grid: Grid, kernel: Kernel, window: Window, dimensions: int) -> Chain:
    """The chain that samplers.rollout runs with an affine denoiser, found by probing it at the origin and unit vectors."""
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


def exact_output(process: Process, cov: Array, mean: Callable[[Tensor], Tensor]) -> Output:
    """The denoiser, in float64, that is exact for N(mean(t), cov): at each time t [B] it may believe in another mean [B, D]."""
    covariance = torch.from_numpy(cov)
    eye = torch.eye(len(cov), dtype=torch.float64)

    def output(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        marginal = alpha[..., None] ** 2 * covariance + sigma[..., None] ** 2 * eye
        white = torch.linalg.solve(marginal, (x_t - alpha * mean(t))[..., None])[..., 0]
        return process.combine(mean(t) + alpha * white @ covariance, sigma * white, t)

    return output


def constant(mean: Array) -> Callable[[Tensor], Tensor]:
    """The same mean at every time, for `exact_output`: the denoiser of a Gaussian."""
    return lambda t: torch.from_numpy(mean).expand(len(t), -1)


def interpolated(times: Array, means: Array) -> Callable[[Tensor], Tensor]:
    """A table of means [K, D] at rising times [K], linear in between and constant beyond, for `exact_output`."""
    return lambda t: torch.from_numpy(np.stack([np.interp(t.numpy(), times, column) for column in means.T], axis=1))
