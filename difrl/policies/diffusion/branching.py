"""What samples share before they part: nothing, or their initial noise and the denoising steps before the window.

Samples with neighbouring numbers make a branch: sample i belongs to branch i // size. The shared steps are evaluated
once a branch. Branch sampling is B²-DiffuRL's (arXiv:2503.11240); with the window at step 0 only the initial noise is
shared, as in DanceGRPO (2505.07818).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from difrl.config import RunConfig
from samplers import Kernel, ode


@dataclass(frozen=True)
class Branching:
    """How many samples share a prefix, and how it is drawn."""

    size: int = 1
    """Samples of a branch; 1: nothing is shared."""
    kernel: Kernel = ode
    """Of the shared steps."""
    noisy: bool = False
    """Whether they are drawn from the kernel; else its mean is taken."""

    def chunks(self, samples: Tensor, most: int) -> Iterator[Tensor]:
        """Rows of samples [B] by their numbers: whole branches, as many as `most` samples hold and at least one."""
        owners = samples // self.size
        for some in owners.unique().split(max(1, most // self.size)):
            yield torch.isin(owners, some).nonzero().flatten()

    def owners(self, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The branches' numbers [K], a row of each [K], and which of them each sample belongs to [B]."""
        numbers, owner = (samples // self.size).unique(return_inverse=True)
        rows = torch.arange(len(samples), device=samples.device)
        first = rows.new_zeros(len(numbers)).scatter_reduce(0, owner, rows, "amin", include_self=False)
        return numbers, first, owner


NO_BRANCHING = Branching()
"""Every sample from noise of its own."""


def build_branching(config: RunConfig, kernel: Kernel) -> Branching:
    """The branching a recipe names."""
    branch = config.rollout.branch
    if branch is None:
        return NO_BRANCHING
    return (
        Branching(config.samples_per_group, kernel, noisy=True)
        if branch.prefix == "kernel"
        else Branching(config.samples_per_group)
    )
