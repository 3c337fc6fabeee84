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
    Stochastic schedulers (`draws_noise`) draw from the global generators; for keyed noise use `rollout`.
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


def draws_noise(scheduler: Scheduler, process: Process, steps: int, *, sequence_length: int | None = None) -> bool:
    """Return whether a run of the scheduler draws random numbers: it moves torch's generator, or does not repeat itself.

    This depends on the scheduler's configuration and on the number of steps, so two runs from one small state decide.
    """

    def run() -> Tensor:
        nothing = Condition({"nothing": torch.zeros(1, 1)})
        x_init = torch.linspace(-1.0, 1.0, 16).reshape(1, 1, 4, 4)
        x0 = solve(
            lambda x, t, condition: 0.5 * x, process, scheduler, steps, x_init, nothing, sequence_length=sequence_length
        )
        return x0.nan_to_num()

    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        first = run()
        return not (torch.equal(before, torch.get_rng_state()) and torch.equal(first, run()))
