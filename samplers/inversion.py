"""Map clean samples back to noise, by running the deterministic sampler backwards."""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.grid import Grid
from samplers.guidance import Condition, Denoiser
from samplers.kernels import ode
from samplers.process import Process, at_least_float32


@torch.no_grad()
def invert(denoiser: Denoiser, process: Process, grid: Grid, x0: Tensor, condition: Condition) -> Tensor:
    """Return the states [B,N,...] at grid.times[0] … grid.times[N-1] from which the ODE ends approximately in `x0` [B,...].

    DDIM inversion (2105.05233; for flow matching the backward Euler path). Each step of `ode` from s to t < s is undone
    with the output at its end, x_s = alpha_s x0_hat(x_t, t) + sigma_s eps_hat(x_t, t). The ODE from these states ends
    within the order of a step of x0. N evaluations a sample.
    """
    if process.prediction == "sample" and grid.times[-1] == 0:
        raise ValueError(
            "inversion begins with the noise that the model predicts at a clean sample, and an x0 prediction holds none; "
            "take a model that predicts epsilon, v or the velocity"
        )
    times, batch, x = grid.times.to(x0.device), x0.shape[0], at_least_float32(x0)
    states: list[Tensor] = []
    for step in reversed(range(grid.steps)):
        t, s = times[step + 1].expand(batch), times[step].expand(batch)
        x = ode(process, denoiser(x, t, condition), x, t, s).mean
        states.append(x)
    return torch.stack(states[::-1], 1)
