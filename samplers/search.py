"""Search with a reward instead of training: the best of N samples, and SVDD, which selects at every step.

Both select among samples of the model itself, and need values, not gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from samplers.grid import Grid, Window
from samplers.guidance import Condition, Denoiser
from samplers.kernels import Kernel, check_window, ode
from samplers.process import Process, at_least_float32

Value = Callable[[Tensor, Tensor], Tensor]
"""(clean predictions [n,...], the number of the sample that each belongs to, [n] int64) -> values [n], NaN for none."""


def best_of(values: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
    """Return the position of the best valid draw of each group, [groups], in the order of the groups' ids.

    The first of equal draws wins. A group without a valid draw yields its first, as if there had been no search. The
    selected draw has KL(selected || model) <= log N - (N-1)/N (2401.01879), so the divergence of N draws is bounded in
    advance.

    Args:
      values: [B].
      valid: [B] bool.
      groups: [B] ids.
    """
    usable = valid & ~values.isnan()
    # Lexicographic by stable sorts, the last key first: by group, then usable, then the best first, then the earliest.
    order = torch.argsort(torch.where(usable, values.double(), -torch.inf), descending=True, stable=True)
    order = order[torch.argsort(usable[order].int(), descending=True, stable=True)]
    order = order[torch.argsort(groups[order], stable=True)]
    first = torch.ones(len(order), dtype=torch.bool, device=order.device)
    first[1:] = groups[order][1:] != groups[order][:-1]
    return order[first]


def choose(values: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """Draw a column [B] of values [B, M] with probability proportional to exp(value / temperature).

    Temperature 0 takes the largest. `uniforms` [B] in [0, 1) are the randomness. NaN is never drawn unless a row has
    nothing else.
    """
    values = torch.where(values.isnan(), -torch.inf, values.double())
    if temperature == 0:
        return values.argmax(dim=1)
    weights = ((values - values.amax(dim=1, keepdim=True)) / temperature).exp()
    cumulative = torch.where(weights.isnan(), 1.0, weights).cumsum(dim=1)  # a row of NaN is uniform
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
    """Sample x0 [B,...] from `x_init` [B,...] by soft value-based decoding (SVDD, 2408.08252), posterior-mean value.

    Each step of `window` draws M = `candidates` states from the kernel and keeps one with probability proportional to
    exp(v / temperature). v is the value of x0_hat at the candidate, in place of the soft value
    temperature * log E[exp(r(x0) / temperature) | x_s]. Where data are Gaussian and r is linear the two differ by a
    constant, so with many candidates and fine steps this samples the tilted distribution
    p(x0) exp(r(x0) / temperature). Other steps take the ODE.

    noise(step, candidate) [B,...] ~ N(0, I); uniform(step) [B] in [0, 1). The evaluation of the kept candidate serves
    the next step, so a stochastic step costs M evaluations a sample, plus one before the first.
    """
    check_window(kernel, process, grid, window)
    if candidates < 1 or temperature < 0:
        raise ValueError(
            f"svdd needs 1 candidate or more and a temperature of 0 or more, got {candidates} and {temperature}"
        )
    batch, times = x_init.shape[0], grid.times.to(x_init.device)
    samples = torch.arange(batch, device=x_init.device)
    several = condition.repeat_interleave(candidates)
    x_t, output = at_least_float32(x_init), None
    for step in range(grid.steps):
        t, s = times[step].expand(batch), times[step + 1].expand(batch)
        output = at_least_float32(denoiser(x_t, t, condition)) if output is None else output
        if step not in window:
            x_t, output = ode(process, output, x_t, t, s).mean, None
            continue
        transition = kernel(process, output, x_t, t, s)
        draws = [transition.sample(noise(step, m).to(x_t.device)) for m in range(candidates)]
        drawn, s_drawn = torch.stack(draws, 1).flatten(0, 1), s.repeat_interleave(candidates)
        outputs = at_least_float32(denoiser(drawn, s_drawn, several))
        values = value(process.split(outputs, drawn, s_drawn)[0], samples.repeat_interleave(candidates))
        columns = choose(values.reshape(batch, candidates), temperature, uniform(step).to(x_t.device))
        kept = samples * candidates + columns.to(x_t.device)
        x_t, output = drawn[kept], outputs[kept]
    return x_t
