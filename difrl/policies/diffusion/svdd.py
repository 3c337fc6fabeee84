"""SVDD on a diffusion policy: at every step the reward chooses among states that the model itself draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.policies.base import GuidanceSettings, NoiseKey, batches
from difrl.policies.diffusion.guidance import build_guidance
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.errors import ModelError
from samplers import Window, keyed_uniform, make_kernel, svdd, transition_std

Score = Callable[[Rollout], Tensor]
"""Samples -> values [B]; NaN where there is none."""


@dataclass(frozen=True)
class SVDDSettings:
    """M candidates at every step, of which one is kept with probability proportional to exp(value / temperature)."""

    candidates: int
    temperature: float


@torch.no_grad()
def draw_with_svdd(
    policy: DiffusionPolicy,
    prompts: Sequence[Prompt],
    samples: Tensor,
    key: NoiseKey,
    steering: GuidanceSettings,
    decoding: SVDDSettings,
    score: Score,
) -> Rollout:
    """One sample for each prompt, by samplers.svdd over the steps of the policy's evaluations.

    The kernel is DDIM's at η = 1, as in the paper: at η = 0 there is nothing to choose from. Steps on which it is
    nearly silent are the ODE's. Values are those of decoded clean predictions, so a step costs M decodings too.
    """
    sampling = policy.evaluation_sampling
    if sampling.scheduler is not None:
        raise ModelError(
            "SVDD draws candidates from a kernel, and this run samples with a solver; train with rollout.solver: null"
        )
    kernel = make_kernel("ddim", 1.0, sampling.grid)
    window = Window.noisy(transition_std(kernel, policy.process, sampling.grid))
    steered = build_guidance(policy.denoiser, sampling.guidance, steering, sampling.grid)
    latents = []
    for rows in batches(len(prompts), max(1, sampling.batch // decoding.candidates)):
        asked, numbers = prompts[rows], samples[rows]
        condition = policy.prompts(asked, sampling.guidance != 1).numbered(rows.start)
        draw = _Draws(sampling.shape, key, numbers, policy.device)
        value = _Value(policy, asked, score)
        latents.append(
            svdd(
                steered.denoiser,
                policy.process,
                sampling.grid,
                kernel,
                draw.init(),
                condition,
                window=window,
                candidates=decoding.candidates,
                temperature=decoding.temperature,
                value=value,
                noise=draw.noise,
                uniform=draw.uniform,
            )
        )
    images = torch.cat([policy.family.decode(part) for part in latents])
    return Rollout(tuple(prompts), samples, samples, {}, images, measures=steered.measures(len(prompts)))


@dataclass(frozen=True)
class _Draws:
    """The keyed randomness of a batch; the start is that of an evaluation with the same key."""

    shape: Sequence[int]
    key: NoiseKey
    samples: Tensor
    device: torch.device

    def init(self) -> Tensor:
        return self._normal("init", 0)

    def noise(self, step: int, candidate: int) -> Tensor:
        return self._normal(f"svdd/{candidate}", step)

    def uniform(self, step: int) -> Tensor:
        key, use = self.key, f"{self.key.purpose}/svdd/choice"
        return keyed_uniform((), seed=key.seed, step=key.step, samples=self.samples, use=use, index=step)

    def _normal(self, use: str, index: int) -> Tensor:
        return self.key.normal(self.shape, self.samples, use, index, self.device)


@dataclass(frozen=True)
class _Value:
    """What a clean prediction is worth: decoded, and scored with its own sample's prompt."""

    policy: DiffusionPolicy
    prompts: Sequence[Prompt]
    score: Score

    def __call__(self, x0_hat: Tensor, rows: Tensor) -> Tensor:
        asked = tuple(self.prompts[row] for row in rows.tolist())
        return self.score(Rollout(asked, rows, rows, {}, self.policy.family.decode(x0_hat)))
