"""What a diagnosis looks into of a diffusion policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch

from difrl.data.rollout import Rollout
from difrl.policies.diagnosis import Examined, Suspect, drawn_with_others, widened

if TYPE_CHECKING:
    from difrl.policies.diffusion.policy import DiffusionPolicy


def examined(policy: DiffusionPolicy, rollout: Rollout) -> Examined:
    """Guidance is the setting that may have changed."""
    own = policy.own_guidance
    scales = {1.0, policy.sampling.guidance, policy.evaluation_sampling.guidance} - {own}
    return Examined(
        policy.family.denoiser,
        "denoiser",
        policy.dtype,
        partial(in_precision, policy),
        policy.recompute_logprobs,
        policy.snapshots,
        policy.sampling.snapshot,
        drawn_with_others(rollout, policy.weights_drawn_with()),
        [Suspect({"guidance": scale}, _guidance(scale, own)) for scale in sorted(scales)],
    )


def _guidance(scale: float, own: float) -> str:
    return (
        f"Found: guidance differs between rollout and likelihood: the samples were drawn at {scale:g} and are "
        f"evaluated at {own:g}. Evaluate the likelihood under the guidance of the rollout (rollout.guidance)"
    )


@contextmanager
def in_precision(policy: DiffusionPolicy, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block the policy evaluates in another precision; frozen weights of a lower one are widened for it."""
    before = policy.dtype
    context = widened(policy.family.denoiser) if dtype == torch.float32 else nullcontext()
    with context:
        policy.dtype = policy.prompts.dtype = dtype
        try:
            yield
        finally:
            policy.dtype = policy.prompts.dtype = before
