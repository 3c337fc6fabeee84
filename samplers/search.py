"""Search with a reward instead of training: the best of N samples, and SVDD, which chooses at every step.

Both only ever choose among what the model itself draws, and need values, not gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from samplers.grid import Grid, Window
from samplers.guidance import Condition, Denoiser
from samplers.kernels import Kernel, ode, transition_std
from samplers.process import Process, raised

Value = Callable[[Tensor, Tensor], Tensor]
"""(clean predictions [n,...], the sample [n] int64 each belongs to) -> values [n]; NaN where there is none."""


def best_of(values: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
    """For every group, in the order of their ids, the position [groups] of its best valid draw.

    values [B], valid [B] bool, groups [B] int. The first of equals wins, and the first draw of a group without a valid
    one: as if there had been no search. The chosen draw's distribution has KL(chosen || model) <= log N - (N-1)/N
    (2401.01879), so the price of N draws is known beforehand.
    """
    usable = valid & ~values.isnan()
    # Lexicographic by stable sorts, the last key first: by group, there the best first, there the earliest.
    order = torch.argsort(torch.where(usable, values.double(), -torch.inf), descending=True, stable=True)
    order = order[torch.argsort(usable[order].int(), descending=True, stable=True)]
    order = order[torch.argsort(groups[order], stable=True)]
    first = torch.ones(len(order), dtype=torch.bool, device=order.device)
    first[1:] = groups[order][1:] != groups[order][:-1]
    return order[first]


def choose(values: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """A column [B] of values [B, M], with probability proportional to exp(value / temperature); 0: the largest.

    uniforms [B] in [0, 1) decide. NaN is never chosen where there is anything else.
    """
    values = torch.where(values.isnan(), -torch.inf, values.double())
    if temperature == 0:
        return values.argmax(dim=1)
    weights = ((values - values.amax(dim=1, keepdim=True)) / temperature).exp()
    cumulative = torch.where(weights.isnan(), 1.0, weights).cumsum(dim=1)  # a row of NaN has no preference
    below = cumulative <= uniforms.double()[:, None] * cumulative[:, -1:]
    return below.sum(dim=1)


@torch.no_grad()
def svdd(
    denoiser: Denoiser,
    process: Process,
    grid: Grid,
    kernel: Kernel,
    x_init: Tensor,
    condition: Condition,
    *,
    window: Window,
    candidates: int,
    temperature: float,
    value: Value,
    noise: Callable[[int, int], Tensor],
    uniform: Callable[[int], Tensor],
) -> Tensor:
    """Soft value-based decoding (SVDD, 2408.08252) with the posterior-mean value: x0 [B,...] from `x_init` [B,...].

    Each step of `window` draws M = `candidates` states from the kernel and keeps one with probability proportional to
    exp(v / temperature), v = value of x0_hat at the candidate, in place of the soft value
    temperature * log E[exp(r(x0) / temperature) | x_s]. Where data are Gaussian and r is linear they differ by a
    constant, so with many candidates and fine steps this samples the tilted distribution
    p(x0) exp(r(x0) / temperature). Other steps take the ODE.

    noise(step, candidate) [B,...] ~ N(0, I); uniform(step) [B] in [0, 1). A candidate's evaluation serves the next step
    too, so a stochastic step costs M evaluations a sample, and one comes before the first.
    """
    _check(process, grid, kernel, window, candidates, temperature)
    batch, times = x_init.shape[0], grid.times.to(x_init.device)
    samples = torch.arange(batch, device=x_init.device)
    several = condition.repeat_interleave(candidates)
    x_t, output = raised(x_init), None
    for step in range(grid.steps):
        t, s = times[step].expand(batch), times[step + 1].expand(batch)
        output = raised(denoiser(x_t, t, condition)) if output is None else output
        if step not in window:
            x_t, output = ode(process, output, x_t, t, s).mean, None
            continue
        transition = kernel(process, output, x_t, t, s)
        drawn = torch.stack([transition.sample(noise(step, m).to(x_t.device)) for m in range(candidates)], 1).flatten(
            0, 1
        )
        s_drawn = s.repeat_interleave(candidates)
        outputs = raised(denoiser(drawn, s_drawn, several))
        values = value(process.split(outputs, drawn, s_drawn)[0], samples.repeat_interleave(candidates))
        chosen = choose(values.reshape(batch, candidates), temperature, uniform(step).to(x_t.device))
        kept = samples * candidates + chosen.to(x_t.device)
        x_t, output = drawn[kept], outputs[kept]
    return x_t


def _check(process: Process, grid: Grid, kernel: Kernel, window: Window, candidates: int, temperature: float) -> None:
    window.check(grid.steps)
    if candidates < 1 or temperature < 0:
        raise ValueError(
            f"svdd wants 1 candidate or more and a temperature of 0 or more, got {candidates} and {temperature}"
        )
    stds = transition_std(kernel, process, grid).tolist()
    silent = [step for step in window.indices if not stds[step] > 0]
    if silent:
        raise ValueError(
            f"the kernel adds no noise at steps {silent}, so all their candidates are one state; raise noise_level, take a "
            "stochastic kernel such as ddim at 1, or leave these steps out of the window"
        )
