"""Drawing samples from a diffusion policy: prompts → conditions → latents and what was recorded on the way → images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difrl.data.prompts import Prompt
from difrl.data.videos import Videos
from difrl.policies.base import NoiseKey, batches
from difrl.policies.diffusion.branching import NO_BRANCHING, Branching
from difrl.policies.diffusion.families import Family
from difrl.policies.diffusion.prompt_encoder import PromptEncoder
from difrl.runtime.progress import count_done, phase
from samplers import (
    Condition,
    Denoiser,
    Grid,
    Kernel,
    Reduction,
    Scheduler,
    Window,
    advance,
    rollout,
    solve,
)


@dataclass(frozen=True)
class Sampling:
    """Settings of drawing samples."""

    grid: Grid
    kernel: Kernel
    window: Callable[[NoiseKey], Window]
    guidance: float
    snapshot: str
    batch: int
    shape: tuple[int, ...]
    """Shape of one latent."""
    reduce: Reduction = "mean"
    """Reduction of the recorded log-probabilities over the dimensions of a latent."""
    means: bool = False
    """True if the means of transitions are recorded."""
    scheduler: Scheduler | None = None
    """A diffusers scheduler that takes the kernel's place."""
    branching: Branching = NO_BRANCHING
    """The part of a run that samples share before the window."""
    precision: str = "same"
    """`rollout.precision`."""
    correction: float | None = None
    """Upper bound of the importance weight of a recorded step. None if the samples are not corrected."""


@torch.no_grad()
def draw(
    denoiser: Denoiser,
    encoder: PromptEncoder,
    prompts: Sequence[Prompt],
    samples: Tensor,
    key: NoiseKey,
    sampling: Sampling,
) -> dict[str, Tensor]:
    """Draw one latent for each prompt. Return `latents` and the recorded steps of the window: name -> [B, ...]."""
    device, chunks = encoder.family.device, list(sampling.branching.chunks(samples, sampling.batch))
    parts = []
    for rows in chunks:
        condition = encoder([prompts[i] for i in rows.tolist()], sampling.guidance != 1)
        condition = replace(condition, rows=rows.to(device))
        parts.append(_draw_branches(denoiser, encoder.family, condition, samples[rows], key, sampling))
        count_done(len(rows))
    back = torch.cat(chunks).argsort().to(device)
    return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}


def _draw_branches(
    denoiser: Denoiser, family: Family, condition: Condition, samples: Tensor, key: NoiseKey, sampling: Sampling
) -> dict[str, Tensor]:
    """Draw whole branches: the steps that their samples share once each, then every sample's own steps."""
    process, grid, branching, device = family.process, sampling.grid, sampling.branching, family.device
    numbers, first, owner = branching.owners(samples)
    x_init = key.normal(sampling.shape, numbers, "init", device=device)
    if sampling.scheduler is not None:
        length = family.sequence_length(sampling.shape)
        x0 = solve(denoiser, process, sampling.scheduler, grid.steps, x_init[owner], condition, sequence_length=length)
        return {"latents": x0}
    window = sampling.window(key)
    shared = advance(
        denoiser,
        process,
        grid,
        branching.kernel,
        x_init,
        condition.select(first.to(device)),
        steps=window.start,
        noise=(lambda step: key.normal(sampling.shape, numbers, "prefix", step, device)) if branching.noisy else None,
    )

    def draw_own(rows: slice) -> dict[str, Tensor]:
        trajectory = rollout(
            denoiser,
            process,
            grid,
            sampling.kernel,
            shared[owner[rows].to(device)],
            condition.select(rows),
            window=window,
            noise=lambda step: key.normal(sampling.shape, samples[rows], "sde", step, device),
            start=window.start,
            log_prob_reduce=sampling.reduce,
            keep_means=sampling.means,
        )
        count = len(trajectory.x0)
        return {
            **({} if trajectory.mean is None else {"mean": trajectory.mean}),
            "latents": trajectory.x0,
            "x_t": trajectory.x_t,
            "x_next": trajectory.x_next,
            "t": trajectory.t,
            "s": trajectory.s,
            "log_prob": trajectory.log_prob,
            "together": torch.full((count,), count, device=device),
        }

    parts = [draw_own(rows) for rows in batches(len(samples), sampling.batch)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


DECODED_PIXELS = 2**18
"""Pixels that the autoencoder decodes at once: one image of 512 × 512, for which it takes about 0.6 GiB."""


def decode(family: Family, latents: Tensor, batch: int) -> Tensor | Videos:
    """Return the images of latents [B, ...], or their videos, which are decoded when they are read.

    At most `batch` are decoded at a time, and of large ones as many as have `DECODED_PIXELS`, but at least one.
    """
    batch = max(1, min(batch, DECODED_PIXELS // family.pixels))
    if "num_frames" in family.inputs:
        return Videos(tuple(latents), lambda rows: family.decode(torch.stack(list(rows))), batch, latents.device)
    parts = []
    with phase("decoding images", total=len(latents)):
        for rows in batches(len(latents), batch):
            parts.append(family.decode(latents[rows]))
            count_done(len(parts[-1]))
    return torch.cat(parts)
