"""Guidance of a trained language model: the weights that draw, and the processors of their logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
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
    if settings.rlg == 0 and settings.first_steps == 0:
        return TextGuidanceRun(BASE, (), _nowhere if settings.measure else _nothing)
    if settings.rlg == 1 and not settings.measure:
        return TextGuidanceRun(CURRENT, (), _nothing)
    divergence = BaseDivergence() if settings.measure else None
    under = partial(snapshots.use, BASE)
    guidance = TextGuidance(network.model, settings.rlg, under, settings.first_steps, divergence)
    return TextGuidanceRun(CURRENT, (guidance,), _nothing if divergence is None else partial(_measured, divergence))


def _nothing(count: int) -> dict[str, Tensor]:
    return {}


def _nowhere(count: int) -> dict[str, Tensor]:
    return {DIVERGENCE: torch.zeros(count, dtype=torch.float64)}


def _measured(divergence: BaseDivergence, count: int) -> dict[str, Tensor]:
    return {DIVERGENCE: divergence.sums(count)}
