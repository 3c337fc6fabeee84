"""Noising of clean samples: the states at which a forward likelihood is evaluated."""

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
    """Parts of a policy's model: the denoiser of a snapshot without guidance, and the condition of a rollout's prompts."""

    denoiser: Callable[[str], Denoiser]
    condition: Callable[[Rollout], Condition]
    batch: int
    """Number of samples evaluated at once."""


class Noising(Protocol):
    """A function that chooses the noise of each decision."""

    def __call__(self, rollout: Rollout, t: Tensor, key: NoiseKey, model: ModelAccess) -> tuple[Tensor, Tensor]:
        """Return (x_t, ε) [B, J, ...] at times t [B, J], with x_t = α_t x0 + σ_t ε for the clean samples x0."""


@dataclass(frozen=True)
class Fresh:
    """ε ~ N(0, I), keyed by the sample, or by its group if the samples of a group share it."""

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
    """x_t on the deterministic path that leads to x0, so that ε is the noise from which the model draws x0 (2503.18454).

    The path is inverted along the sampler's grid, on which t must lie. This costs one evaluation a step, the first step
    excepted, for any number of decisions. ε = (x_t − α_t x0) / σ_t.
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
        grid = Grid(self.grid.times[1:])  # no decision is at the first time, where states are almost pure noise
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
    """Build the noising of a recipe."""
    if isinstance(config.noise, FreshNoise):
        return Fresh(process, "noise" in config.share)
    return Inverted(process, grid, config.noise.snapshot)
