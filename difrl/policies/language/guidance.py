"""Guidance of a trained language model: the weights that draw, and the processors of their logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from difrl.policies.base import GuidanceSettings
from difrl.policies.errors import ModelError
from difrl.policies.language.lm_head import CausalLM
from difrl.policies.snapshots import BASE, CURRENT, Snapshots
from samplers import BaseDivergence, Processing, TextGuidance

DIVERGENCE = "divergence/base"


@dataclass(frozen=True)
class TextGuidanceRun:
    """The guidance of one call."""

    snapshot: str
    processors: tuple[Processing, ...]
    measures: Callable[[int], Mapping[str, Tensor]]
    """(number of samples B) → name → [B]; to be called after they are drawn."""


def build_text_guidance(network: CausalLM, snapshots: Snapshots, settings: GuidanceSettings) -> TextGuidanceRun:
    """Build RLG, which blends the logits of every token (samplers/text_guidance.py). At w = 0 and w = 1 one model draws alone."""
    if settings.adaptive is not None:
        raise ModelError(
            "adaptive guidance is for image models only; leave it out, or remove `adaptive` from inference.json"
        )
    divergence = BaseDivergence() if settings.measure else None

    def measure(count: int) -> dict[str, Tensor]:
        return {} if divergence is None else {DIVERGENCE: divergence.sums(count)}

    if settings.rlg == 0 and settings.first_steps == 0:
        return TextGuidanceRun(BASE, (), measure)  # a divergence to which nothing was added is 0
    if settings.rlg == 1 and divergence is None:
        return TextGuidanceRun(CURRENT, (), measure)
    under = partial(snapshots.use, BASE)
    guidance = TextGuidance(network.model, settings.rlg, under, settings.first_steps, divergence)
    return TextGuidanceRun(CURRENT, (guidance,), measure)
