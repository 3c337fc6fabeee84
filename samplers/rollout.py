"""Sample from noise to data with a denoiser, a grid and a kernel, and record the decisions that will be trained.

Solvers of higher order need no kernel and record nothing; they are in solvers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.grid import Grid, Window
from samplers.guidance import Condition, Denoiser
from samplers.kernels import Kernel, Reduction, check_window, ode
from samplers.process import Process, at_least_float32


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The end of a run and its J recorded decisions x_t -> x_next ~ kernel(t -> s), in float32 at least."""

    x0: Tensor  # [B,...]
    x_t: Tensor  # [B,J,...]
    x_next: Tensor  # [B,J,...]
    t: Tensor  # [B,J] float64: kept exact, so that a decision evaluates again to the same number
    s: Tensor  # [B,J] float64
    log_prob: Tensor  # [B,J], averaged or summed over dimensions (`log_prob_reduce`)
    mean: Tensor | None = None  # [B,J,...] of the kernel, with `keep_means`


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    process: Process,
    grid: Grid,
    kernel: Kernel,
    x_init: Tensor,
    condition: Condition,
    *,
    window: Window,
    noise: Callable[[int], Tensor],
    start: int = 0,
    log_prob_reduce: Reduction = "mean",
    keep_means: bool = False,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Trajectory:
    """Denoise `x_init` [B,...], the state at grid.times[start], along the rest of the grid.

    Steps in `window` are drawn from `kernel` with `noise(step)` [B,...] ~ N(0, I) and recorded; the others
    take the ODE. A `start` above 0, at or before the window, continues from a state of `advance`. The state stays
    in float32 at least, so the denoiser receives float32 and casts for its model itself. `keep_means` records
    the means of the transitions too. `on_step(step, x_next)` is called with every state.
    """
    batch = x_init.shape[0]
    if len(condition) != batch:
        raise ValueError(f"{batch} initial states for {len(condition)} conditions; give one condition a sample")
    check_window(kernel, process, grid, window)
    if not 0 <= start < grid.steps or (window.size and start > window.start):
        raise ValueError(
            f"a rollout of {grid.steps} steps with decisions from step {window.start} cannot start at step {start}; "
            "start at the window or before it"
        )
    times = grid.times.to(x_init.device)
    x_t = at_least_float32(x_init)
    states: list[Tensor] = []
    nexts: list[Tensor] = []
    log_probs: list[Tensor] = []
    means: list[Tensor] = []
    for step in range(start, grid.steps):
        t, s = times[step].expand(batch), times[step + 1].expand(batch)
        output = denoiser(x_t, t, condition)
        if step in window:
            transition = kernel(process, output, x_t, t, s)
            x_next = transition.sample(noise(step).to(x_t.device))
            states.append(x_t)
            nexts.append(x_next)
            log_probs.append(transition.log_prob(x_next, log_prob_reduce))
            means += [transition.mean] if keep_means else []
        else:
            x_next = ode(process, output, x_t, t, s).mean
        if on_step is not None:
            on_step(step, x_next)
        x_t = x_next
    return Trajectory(
        x0=x_t,
        x_t=_stack(states, x_t),
        x_next=_stack(nexts, x_t),
        t=times[window.indices].repeat(batch, 1),
        s=times[[step + 1 for step in window.indices]].repeat(batch, 1),
        log_prob=_stack(log_probs, x_t.new_zeros(batch)),
        mean=_stack(means, x_t) if keep_means else None,
    )


@torch.no_grad()
def advance(
    denoiser: Denoiser,
    process: Process,
    grid: Grid,
    kernel: Kernel,
    x_init: Tensor,
    condition: Condition,
    *,
    steps: int,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Return the state at grid.times[steps], [B,...], from `x_init` at grid.times[0]: a prefix for several rollouts.

    Every step is drawn from `kernel` with `noise(step)`. Without noise it takes the kernel's mean, which is the whole
    step for `ode`. Nothing is recorded: these steps are not decisions.
    """
    if not 0 <= steps < grid.steps:
        raise ValueError(f"a prefix has 0 to {grid.steps - 1} of a run's {grid.steps} steps, got {steps}")
    times, batch = grid.times.to(x_init.device), x_init.shape[0]
    x = at_least_float32(x_init)
    for step in range(steps):
        t, s = times[step].expand(batch), times[step + 1].expand(batch)
        transition = kernel(process, denoiser(x, t, condition), x, t, s)
        x = transition.mean if noise is None else transition.sample(noise(step).to(x.device))
    return x


def _stack(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Stack J tensors of the shape of `like` to [B,J,...], also for J = 0."""
    return torch.stack(list(rows), 1) if rows else like.unsqueeze(1)[:, :0]
