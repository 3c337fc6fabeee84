"""Transition kernels: from a raw output at (x_t, t) and a time s < t to the Gaussian of the next state.

All have one signature, `kernel(process, output, x_t, t, s) -> Gaussian`, and the same function samples a transition and
evaluates a recorded one again. There are two kinds:

* interpolating: mean = alpha_s x0_hat + sqrt(sigma_s^2 - std^2) eps_hat. `ode`, `ddim`, `cps` and `precise`
  differ only in std, and hold for every process.
* Euler-Maruyama, for flow matching: one explicit step of the reverse SDE with diffusion g. `flow_sde` and
  `dance_sde` differ only in g.

`noise_level` (eta) is 0 for the deterministic limit of each. Mathematics is float32 at least; see process.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from samplers.grid import Grid, Window
from samplers.process import FLOW, Process, at_least_float32, expand

Reduction = Literal["mean", "sum"]
Kernel = Callable[[Process, Tensor, Tensor, Tensor, Tensor], "Gaussian"]


class Gaussian(NamedTuple):
    """N(mean, std^2 I) for each sample: mean [B,...], std [B,1,...]. At std = 0 it has no density."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std noise, for `noise` ~ N(0, I) of the mean's shape."""
        if noise.shape != self.mean.shape:
            # Broadcasting would silently give several samples the same noise.
            raise ValueError(f"noise {tuple(noise.shape)}, state {tuple(self.mean.shape)}: give one shape")
        return self.mean + self.std * noise.to(self.mean.dtype)

    def log_prob(self, x: Tensor, reduce: Reduction = "mean") -> Tensor:
        """Return log N(x; mean, std^2), [B], averaged over non-batch dimensions (the field's convention) or summed.

        Clip ranges published for the average hold for latents of about 65,000 numbers only.
        """
        z = (x - self.mean) / self.std
        return _reduce(-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi), reduce)

    def kl(self, other: Gaussian, reduce: Reduction = "mean") -> Tensor:
        """Return KL(self || other) = |mean - other.mean|^2 / (2 std^2), [B], reduced as in `log_prob`.

        Both must come from one kernel at the same times, so that they have the same std.
        """
        if self.std is not other.std and not torch.equal(self.std, other.std):
            raise ValueError(
                "KL between Gaussians of different std; the closed form is for two outputs under one kernel: "
                "evaluate both with the same kernel, t and s"
            )
        return _reduce(0.5 * ((self.mean - other.mean) / self.std).square(), reduce)


def _reduce(values: Tensor, reduce: Reduction) -> Tensor:
    values = values.flatten(1)
    if reduce == "mean":
        return values.mean(1)
    if reduce == "sum":
        return values.sum(1)
    raise ValueError(f'reduce must be "mean" or "sum" (over non-batch dimensions), got {reduce!r}')


def _interpolate(process: Process, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor, std: Tensor) -> Gaussian:
    x0_hat, eps_hat = process.split(output, x_t, t)
    kept = (process.sigma(s).square() - std.square()).clamp(min=0).sqrt()
    mean = expand(process.alpha(s), x0_hat) * x0_hat + expand(kept, eps_hat) * eps_hat
    return Gaussian(mean, expand(std, mean))


def _noise_ratio(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """Return rho = (alpha_t sigma_s) / (alpha_s sigma_t), in [0, 1]; for flow matching s(1-t)/(t(1-s))."""
    return process.alpha(t) * process.sigma(s) / (process.alpha(s) * process.sigma(t))


def ode(process: Process, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Gaussian:
    """Deterministic step, std = 0: DDIM at eta = 0 (2010.02502); for flow matching the Euler step x + (s-t) v."""
    return _interpolate(process, output, x_t, t, s, torch.zeros_like(process.sigma(s)))


def ddim(process: Process, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor, *, noise_level: float) -> Gaussian:
    """DDIM (2010.02502, eq. 16): std = eta (sigma_s/sigma_t) sqrt(sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2).

    Written as eta sigma_s sqrt(1 - rho^2). At eta = 1 it is the posterior q(x_s | x_t, x0_hat) of DDPM.
    """
    rho = _noise_ratio(process, t, s)
    std = noise_level * process.sigma(s) * (1 - rho.square()).clamp(min=0).sqrt()
    return _interpolate(process, output, x_t, t, s, std)


def cps(process: Process, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor, *, noise_level: float) -> Gaussian:
    """Coefficient-preserving sampling (2509.05952): std = sigma_s sin(eta pi/2).

    Every state has its full noise level, kept and fresh noise together, but samples lose variance: samples of
    Gaussian data have (1 + cos(eta pi/2))/2 of the data's variance. The paper's "log-prob" leaves out the variance
    of the kernel; `Gaussian.log_prob` includes it.
    """
    return _interpolate(process, output, x_t, t, s, process.sigma(s) * math.sin(noise_level * math.pi / 2))


def precise(process: Process, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor, *, noise_level: float) -> Gaussian:
    """Precise (2605.23522): std = sigma_s sqrt(1 - rho^(eta^2)).

    The exact solution of Flow-SDE's equation with x0_hat held fixed, as `precise` in the authors' code. At
    eta = sqrt(2) it is `ddim` at eta = 1.
    """
    rho = _noise_ratio(process, t, s)
    std = process.sigma(s) * (1 - rho ** (noise_level**2)).clamp(min=0).sqrt()
    return _interpolate(process, output, x_t, t, s, std)


def _euler_maruyama(process: Process, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor, g: Tensor) -> Gaussian:
    """Take one step: mean = x + (v - g^2 score / 2) dt, std = g sqrt(-dt), score = -eps_hat/t, dt = s - t < 0."""
    if process.prediction != FLOW:
        raise ValueError(
            f"flow_sde and dance_sde are SDEs of flow matching, and this process has {process.prediction!r} "
            "outputs; use ddim, cps or precise"
        )
    x0_hat, eps_hat = process.split(output, x_t, t)
    dt = s.double() - t.double()
    correction = 0.5 * g.square() * dt / t.double()
    mean = at_least_float32(x_t) + expand(dt, x0_hat) * (eps_hat - x0_hat) + expand(correction, eps_hat) * eps_hat
    return Gaussian(mean, expand(g * (-dt).sqrt(), mean))


def flow_sde(
    process: Process, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor, *, noise_level: float, t_cap: float
) -> Gaussian:
    """Flow-GRPO (2505.05470): g = eta sqrt(t/(1-t)). At t = 1 the denominator is 1 - t_cap."""
    t = t.double()
    g = noise_level * (t / (1 - torch.where(t >= 1, t_cap, t))).sqrt()
    return _euler_maruyama(process, output, x_t, t, s, g)


def dance_sde(process: Process, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor, *, noise_level: float) -> Gaussian:
    """DanceGRPO (2505.07818): g = eta."""
    return _euler_maruyama(process, output, x_t, t, s, torch.full_like(t, noise_level, dtype=torch.float64))


class KernelRange(NamedTuple):
    """A kernel for all noise levels from 0 to the highest."""

    highest: float
    build: Callable[[float, Grid], Kernel]
    """(noise_level, grid) -> the kernel."""


KERNELS: Mapping[str, KernelRange] = {
    "ode": KernelRange(0.0, lambda eta, grid: ode),
    "ddim": KernelRange(1.0, lambda eta, grid: partial(ddim, noise_level=eta)),
    "cps": KernelRange(1.0, lambda eta, grid: partial(cps, noise_level=eta)),
    "precise": KernelRange(math.inf, lambda eta, grid: partial(precise, noise_level=eta)),
    "flow_sde": KernelRange(math.inf, lambda eta, grid: partial(flow_sde, noise_level=eta, t_cap=float(grid.times[1]))),
    "dance_sde": KernelRange(math.inf, lambda eta, grid: partial(dance_sde, noise_level=eta)),
}


def make_kernel(name: str, noise_level: float, grid: Grid) -> Kernel:
    """Return the kernel `name` of KERNELS at a noise level, for the times of `grid`."""
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}; known: {', '.join(KERNELS)}")
    entry = KERNELS[name]
    if not (math.isfinite(noise_level) and 0 <= noise_level <= entry.highest):
        ranges = ", ".join(f"{key} [0, {value.highest:g}]" for key, value in KERNELS.items())
        raise ValueError(f"noise_level {noise_level} is out of range for kernel {name!r}; ranges: {ranges}")
    return entry.build(noise_level, grid)


def transition_std(kernel: Kernel, process: Process, grid: Grid) -> Tensor:
    """Return the std of each of a grid's N steps under a kernel, [N] float64 on the grid's device.

    No kernel's std depends on the output or the state, so this needs no model.
    """
    t, s = grid.times[:-1], grid.times[1:]
    zeros = torch.zeros(len(t), 1, dtype=torch.float64, device=t.device)
    return kernel(process, zeros, zeros, t, s).std.flatten()


def check_window(kernel: Kernel, process: Process, grid: Grid, window: Window) -> None:
    """Raise ValueError unless the grid has the window's steps and the kernel adds noise at each of them."""
    window.check(grid.steps)
    stds = transition_std(kernel, process, grid).tolist()
    noiseless = [step for step in window.indices if not stds[step] > 0]
    if noiseless:
        raise ValueError(
            f"the kernel adds no noise (std is 0) at steps {noiseless}, so they have no log-probability and cannot be "
            "decisions; raise noise_level, take a stochastic kernel, or leave these steps out of the window (a window of "
            "size 0 is an ODE run)"
        )
