"""How a trained language model is steered when it is used: which weights draw, and what acts on their logits."""

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
    """One call's way to draw."""

    snapshot: str
    processors: tuple[Processing, ...]
    measures: Callable[[int], Mapping[str, Tensor]]
    """Of so many samples, after they are drawn: name -> [B]."""


def build_text_guidance(network: CausalLM, snapshots: Snapshots, steering: GuidanceSettings) -> TextGuidanceRun:
    """RLG as logits blended token by token (samplers/text_guidance.py); at w = 0 and w = 1 one model alone draws."""
    if steering.adaptive is not None:
        raise ModelError("adaptive guidance is of image models; leave it out, or take `adaptive` out of inference.json")
    if steering.rlg == 0 and steering.first_steps == 0:
        return TextGuidanceRun(BASE, (), _nowhere if steering.measure else _nothing)
    if steering.rlg == 1 and not steering.measure:
        return TextGuidanceRun(CURRENT, (), _nothing)
    divergence = BaseDivergence() if steering.measure else None
    under = partial(snapshots.use, BASE)
    guidance = TextGuidance(network.model, steering.rlg, under, steering.first_steps, divergence)
    return TextGuidanceRun(CURRENT, (guidance,), _nothing if divergence is None else partial(_measured, divergence))


def _nothing(count: int) -> dict[str, Tensor]:
    return {}


def _nowhere(count: int) -> dict[str, Tensor]:
    return {DIVERGENCE: torch.zeros(count, dtype=torch.float64)}


def _measured(divergence: BaseDivergence, count: int) -> dict[str, Tensor]:
    return {DIVERGENCE: divergence.sums(count)}
