"""Divisors of the loss of a denoising step, which depend on its times alone. Times are [N]; results are [N] float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from samplers import Kernel, Process


def slope(kernel: Kernel, process: Process, t: Tensor, s: Tensor) -> Tensor:
    """Return |d mean / d output| of each step. The mean of every kernel is linear in the output, with one factor a step.

    For Flow-SDE it is |dt| (1 + eta^2 / 2), except at t = 1.
    """
    zero = torch.zeros(len(t), 1, dtype=torch.float64, device=t.device)
    means = [kernel(process, output, zero, t, s).mean for output in (zero + 1, zero)]
    return (means[0] - means[1]).abs().flatten()


def time_step(kernel: Kernel, process: Process, t: Tensor, s: Tensor) -> Tensor:
    """Return |dt| of each step."""
    return t.double() - s.double()


Divisor = Callable[[Kernel, Process, Tensor, Tensor], Tensor | None]
STEP_DIVISORS: Mapping[str, Divisor] = {"none": lambda *step: None, "time_step": time_step, "slope": slope}
"""likelihood.step_weight -> divisor of a step's loss: its effect on the weights (GRPO-Guard, arXiv:2510.22319)."""
