"""What a diagnosis looks into of a language policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from difrl.data.rollout import Rollout
from difrl.policies.diagnosis import Examined, Suspect, drawn_with_others, widened

if TYPE_CHECKING:
    from difrl.policies.language.policy import LanguagePolicy


def examined(policy: LanguagePolicy, rollout: Rollout) -> Examined:
    """Temperature is the setting that may have changed."""
    own = policy.speech.temperature
    others = {1.0, policy.speech.evaluation_temperature} - {own, 0.0}
    return Examined(
        policy.network.model,
        "model",
        policy.network.dtype,
        partial(in_precision, policy),
        policy.recompute_logprobs,
        policy.snapshots,
        policy.speech.snapshot,
        drawn_with_others(rollout, policy.weights_drawn_with()),
        [Suspect({"temperature": other}, _temperature(other, own)) for other in sorted(others)],
    )


def _temperature(other: float, own: float) -> str:
    return (
        f"Found: the temperature differs between rollout and likelihood: the samples were drawn at {other:g} and are evaluated "
        f"at {own:g}. Evaluate the likelihood at the temperature of the rollout (generation.temperature)"
    )


@contextmanager
def in_precision(policy: LanguagePolicy, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block the policy evaluates in another precision; frozen weights of a lower one are widened for it."""
    before = policy.network
    context = widened(before.model) if dtype == torch.float32 else nullcontext()
    with context:
        policy.network = replace(before, dtype=dtype)
        try:
            yield
        finally:
            policy.network = before
