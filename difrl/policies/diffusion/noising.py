"""How a clean sample becomes the noisy states at which a forward likelihood is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from difrl.config import ForwardLikelihood, FreshNoise
from difrl.data.rollout import Rollout
from difrl.policies.base import NoiseKey, batches
from samplers import Condition, Denoiser, Grid, Process, corrupt, expand, invert


@dataclass(frozen=True)
class ModelAccess:
    """What a policy lends of its model: the denoiser of a snapshot, without guidance, and the prompts' condition."""

    denoiser: Callable[[str], Denoiser]
    condition: Callable[[Rollout], Condition]
    batch: int
    """Samples evaluated at once."""


class Noising(Protocol):
    """Chooses the noise of each decision."""

    def __call__(self, rollout: Rollout, t: Tensor, key: NoiseKey, model: ModelAccess) -> tuple[Tensor, Tensor]:
        """(x_t, ε) [B, J, ...] at times t [B, J], with x_t = α_t x0 + σ_t ε of the clean samples."""


@dataclass(frozen=True)
class Fresh:
    """ε ~ N(0, I), keyed by the sample, or by its group where samples are to share it."""

    process: Process
    shared: bool

    def __call__(self, rollout: Rollout, t: Tensor, key: NoiseKey, model: ModelAccess) -> tuple[Tensor, Tensor]:
        x0 = rollout.replay_data["latents"]
        owners = rollout.groups if self.shared else rollout.samples
        noise = key.normal((t.shape[1], *x0.shape[1:]), owners, "noise", device=x0.device)
        clean = x0[:, None].expand_as(noise)
        x_t = corrupt(self.process, clean.flatten(0, 1), noise.flatten(0, 1), t.flatten())
        return x_t.unflatten(0, t.shape), noise


@dataclass(frozen=True)
class Inverted:
    """x_t on the deterministic path that leads to x0: the noise with which a model would make it (2503.18454).

    The path is inverted along the sampler's grid, on which t must lie: one evaluation a step but the first, however
    many decisions are taken from it. ε = (x_t − α_t x0) / σ_t.
    """

    process: Process
    grid: Grid
    snapshot: str

    @torch.no_grad()
    def __call__(self, rollout: Rollout, t: Tensor, key: NoiseKey, model: ModelAccess) -> tuple[Tensor, Tensor]:
        x0, denoiser, condition = (
            rollout.replay_data["latents"],
            model.denoiser(self.snapshot),
            model.condition(rollout),
        )
        grid = Grid(self.grid.times[1:])  # no decision is at the first time, where states are all but noise
        step = (t[:, :, None].cpu() == grid.times[:-1]).int().argmax(-1).to(x0.device)
        parts = []
        for rows in batches(len(x0), model.batch):
            states = invert(denoiser, self.process, grid, x0[rows], condition.select(rows))
            parts.append(states[torch.arange(len(states), device=x0.device)[:, None], step[rows]])
        x_t = torch.cat(parts)
        flat, times = x_t.flatten(0, 1), t.flatten()
        clean = x0[:, None].expand_as(x_t).flatten(0, 1)
        alpha, sigma = expand(self.process.alpha(times), flat), expand(self.process.sigma(times), flat)
        return x_t, ((flat - alpha * clean) / sigma).unflatten(0, t.shape)


def build_noising(config: ForwardLikelihood, process: Process, grid: Grid) -> Noising:
    """The noising a recipe names."""
    if isinstance(config.noise, FreshNoise):
        return Fresh(process, "noise" in config.share)
    return Inverted(process, grid, config.noise.snapshot)
