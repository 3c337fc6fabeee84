"""Any diffusers scheduler (DPM-Solver++, UniPC, Heun, ...) as a solver, for runs that record no decisions."""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.grid import Scheduler, prepare_scheduler
from samplers.guidance import Condition, Denoiser
from samplers.process import FLOW, Process, at_least_float32


@torch.no_grad()
def solve(
    denoiser: Denoiser,
    process: Process,
    scheduler: Scheduler,
    steps: int,
    x_init: Tensor,
    condition: Condition,
    *,
    sequence_length: int | None = None,
) -> Tensor:
    """Return x0 [B,...] from unit noise `x_init` [B,...], in `steps` of the scheduler, as a pipeline would.

    A copy of the scheduler takes the steps, in float32 at least. The model is called at the scheduler's
    timesteps; some flow solvers round these to whole numbers while they integrate over unrounded ones.
    Stochastic schedulers draw from torch's global generator; for keyed noise use `rollout`.
    """
    scheduler = prepare_scheduler(scheduler, process, steps, x_init.device, sequence_length=sequence_length)
    x = at_least_float32(x_init)
    # Schedulers of variance-preserving models may rescale the state (Euler: x / alpha); flow ones never do.
    rescaled = process.prediction != FLOW
    if rescaled:
        x = x * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        t = process.time(timestep).to(x.device).expand(x.shape[0])
        x_t = scheduler.scale_model_input(x, timestep) if rescaled else x
        output = at_least_float32(denoiser(x_t, t, condition))
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
    return x
