"""SVDD on a diffusion policy: at every step the reward chooses among states that the model draws."""

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
from difrl.policies.diffusion.sampling import decode
from difrl.policies.errors import ModelError
from difrl.runtime.progress import count_done
from samplers import Window, make_kernel, svdd, transition_std

Score = Callable[[Rollout], Tensor]
"""Samples -> values [B]; NaN for samples that have none."""


@dataclass(frozen=True)
class SVDDSettings:
    """M candidates at every step. One is kept, with probability proportional to exp(value / temperature)."""

    candidates: int
    temperature: float


@torch.no_grad()
def draw_with_svdd(
    policy: DiffusionPolicy,
    prompts: Sequence[Prompt],
    samples: Tensor,
    key: NoiseKey,
    guidance: GuidanceSettings,
    settings: SVDDSettings,
    score: Score,
) -> Rollout:
    """Draw one sample for each prompt, by samplers.svdd over the steps of the policy's evaluations.

    The kernel is that of DDIM at η = 1, as in the paper; at η = 0 all candidates are equal. Steps with almost no noise are
    steps of the ODE. A value is the score of the decoded clean prediction, so a step costs M decodings too.
    """
    sampling = policy.evaluation_sampling
    if sampling.scheduler is not None:
        raise ModelError(
            "SVDD draws candidates from a kernel, and this run samples with a solver; train with rollout.solver: null"
        )
    kernel = make_kernel("ddim", 1.0, sampling.grid)
    window = Window.noisy(transition_std(kernel, policy.process, sampling.grid))
    guided = build_guidance(policy.denoiser, sampling.guidance, guidance, sampling.grid, policy.family.blend)

    def draw(rows: slice) -> Tensor:
        chosen, numbers = prompts[rows], samples[rows]

        def noise(purpose: str, step: int = 0) -> Tensor:
            return key.normal(sampling.shape, numbers, purpose, step, policy.device)

        def value(x0_hat: Tensor, index: Tensor) -> Tensor:
            owners = tuple(chosen[row] for row in index.tolist())
            content = decode(policy.family, x0_hat, sampling.batch)
            return score(Rollout(owners, index, index, {}).with_content(content))

        return svdd(
            guided.denoiser,
            policy.process,
            sampling.grid,
            kernel,
            noise("init"),  # as an evaluation with the same key starts
            policy.prompts(chosen, sampling.guidance != 1).numbered(rows.start),
            window=window,
            candidates=settings.candidates,
            temperature=settings.temperature,
            value=value,
            noise=lambda step, candidate: noise(f"svdd/{candidate}", step),
            uniform=lambda step: key.uniform((), numbers, "svdd/choice", step),
        )

    latents = []
    for rows in batches(len(prompts), max(1, sampling.batch // settings.candidates)):
        latents.append(draw(rows))
        count_done(len(latents[-1]))
    measures = guided.measures(len(prompts))
    content = decode(policy.family, torch.cat(latents), max(1, sampling.batch // settings.candidates))
    return Rollout(tuple(prompts), samples, samples, {}, measures=measures).with_content(content)
