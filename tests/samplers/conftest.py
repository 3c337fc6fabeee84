"""A task with known solutions: Gaussian data, and the denoiser that is exact for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from samplers import Condition, Denoiser, Grid, Kernel, Process, ode


@dataclass
class SamplingTask:
    """x0 ~ N(mean, cov), so x_t ~ N(alpha mean, alpha^2 cov + sigma^2 I) and E[x0 | x_t] is affine in x_t."""

    process: Process
    mean: Tensor  # [D] float64
    cov: Tensor  # [D,D] float64

    def denoiser(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        mean, cov = self.mean.to(x_t.dtype), self.cov.to(x_t.dtype)
        alpha, sigma = (value.to(x_t.dtype)[:, None] for value in (self.process.alpha(t), self.process.sigma(t)))
        eye = torch.eye(len(mean), dtype=x_t.dtype)
        marginal = alpha[:, None] ** 2 * cov + sigma[:, None] ** 2 * eye
        gain = alpha[:, None] * cov @ torch.linalg.inv(marginal)
        x0_hat = mean + (gain @ (x_t - alpha * mean)[:, :, None])[:, :, 0]
        return self.process.combine(x0_hat, (x_t - alpha * x0_hat) / sigma, t)

    def end(self, x_1: Tensor) -> Tensor:
        """Return the end of the exact ODE from a state at t = 1."""
        one = torch.ones(())
        alpha, sigma = float(self.process.alpha(one)), float(self.process.sigma(one))
        values, vectors = torch.linalg.eigh(self.cov)
        scale = (values / (alpha**2 * values + sigma**2)).sqrt()
        return self.mean + (x_1 - alpha * self.mean) @ (vectors * scale) @ vectors.T


def moments(denoiser: Denoiser, process: Process, kernel: Kernel, grid: Grid, mean: Tensor, cov: Tensor):
    """Return the exact mean [D] and covariance [D,D] of a run from N(mean, cov); every transition here is affine.

    The kernel takes all steps but the last, which is a step of the ODE, as in `rollout`.
    """
    size = len(mean)
    probes = torch.cat([torch.zeros(1, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)])
    condition = Condition({"none": torch.zeros(size + 1, 0)})
    for step in range(grid.steps):
        t, s = (grid.times[i].expand(size + 1) for i in (step, step + 1))
        use = kernel if step < grid.steps - 1 else ode
        transition = use(process, denoiser(probes, t, condition), probes, t, s)
        offset = transition.mean[0]
        matrix = (transition.mean[1:] - offset).T
        mean = matrix @ mean + offset
        cov = matrix @ cov @ matrix.T + transition.std[0, 0] ** 2 * torch.eye(size, dtype=torch.float64)
    return mean, cov


@pytest.fixture
def build_task() -> Callable[[Process], SamplingTask]:
    def build(process: Process) -> SamplingTask:
        mean = torch.tensor([1.0, -0.5], dtype=torch.float64)
        cov = torch.tensor([[0.5, 0.3], [0.3, 1.2]], dtype=torch.float64)
        return SamplingTask(process, mean, cov)

    return build


@pytest.fixture
def propagate() -> Callable[..., tuple[Tensor, Tensor]]:
    return moments


@pytest.fixture
def nothing() -> Callable[[int], Condition]:
    """Return the condition of an unconditional model."""
    return lambda batch: Condition({"none": torch.zeros(batch, 0)})
