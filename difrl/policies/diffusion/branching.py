"""Branch sampling: samples share their initial noise and the denoising steps before the window.

Samples with neighbouring numbers make a branch: sample i belongs to branch i // size. The shared steps are evaluated
once a branch (B²-DiffuRL, arXiv:2503.11240). With the window at step 0 only the initial noise is shared, as in DanceGRPO
(2505.07818).
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
    """Size of a branch, and the kernel of its shared prefix."""

    size: int = 1
    """Number of samples of a branch. 1 shares nothing."""
    kernel: Kernel = ode
    """Kernel of the shared steps."""
    noisy: bool = False
    """True if shared steps are drawn from the kernel; otherwise they take its mean."""

    def chunks(self, samples: Tensor, most: int) -> Iterator[Tensor]:
        """Yield rows of samples, given by their numbers [B]: whole branches, with at most `most` samples if one has no more."""
        owners = samples // self.size
        for some in owners.unique().split(max(1, most // self.size)):
            yield torch.isin(owners, some).nonzero().flatten()

    def owners(self, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the numbers of the branches [K], the first row of each [K], and the branch of each sample [B]."""
        numbers, owner = (samples // self.size).unique(return_inverse=True)
        rows = torch.arange(len(samples), device=samples.device)
        first = rows.new_zeros(len(numbers)).scatter_reduce(0, owner, rows, "amin", include_self=False)
        return numbers, first, owner


NO_BRANCHING = Branching()
"""Sampling in which every sample starts from its own noise."""


def build_branching(config: RunConfig, kernel: Kernel) -> Branching:
    """Build the branching of a recipe."""
    branch = config.rollout.branch
    if branch is None:
        return NO_BRANCHING
    return (
        Branching(config.samples_per_group, kernel, noisy=True)
        if branch.prefix == "kernel"
        else Branching(config.samples_per_group)
    )
