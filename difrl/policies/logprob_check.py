"""The check that the first update of a step starts from ratio 1. Every run makes it.

If the likelihoods of training differ from those of the sampler although the weights are the same, every ratio, clip and KL
is wrong, and nothing else shows it. So the check compares, for a few samples:

* the recorded ℓ with the same ℓ evaluated again under the weights that drew the samples (θ, or another snapshot);
* ℓ_θ with that of every reference that has θ's weights at this moment, such as an old policy that is copied at the end of a
  step. A reference that lags by design (a decay above 0, another guidance scale) is not compared.

Two evaluations agree if they differ by float error only. If the objective computes its ratio from them, the ratio must also
keep clear of the range at which the objective clips: for a narrow range or a sum over many decisions, float error is much.
Only a failed comparison costs more evaluations, to find the cause.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from difrl.runtime.errors import UserError

SAMPLES = 4
"""Samples compared in each step and process."""

# Float error of a likelihood evaluated twice in batches of different shape, relative to 1 + |ℓ|.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

RANGE_SHARE = 0.25
"""Share of the range of an objective that float error may take up."""

Close = Callable[[Tensor, Tensor], bool]
"""(ℓ [B, J], ℓ [B, J]) -> True if they differ by float error only."""


class FirstUpdateError(UserError):
    """The policy under training does not agree with the policy that drew the samples."""


@dataclass(frozen=True)
class EvaluationNames:
    """Names of two evaluations that must agree, for the message."""

    one: str = "ℓ_θ"
    other: str = "the sampler's"


@dataclass(frozen=True)
class ClipRange:
    """The range at which an objective clips, and how much of it two evaluations of ℓ take up."""

    size: float
    excursion: Callable[[Tensor, Tensor], float]
    """(ℓ [B, J], ℓ_old [B, J]) -> the largest distance from ratio 1."""
    remedy: str = ""
    """Advice if float error takes up too much of the range."""


def deviation(logp: Tensor, recorded: Tensor, mask: Tensor) -> float:
    """Return max |ℓ − ℓ_recorded| / (1 + |ℓ_recorded|) over decisions that count; NaN if one is NaN, 0 if none counts."""
    found = ((logp.detach() - recorded.detach()).abs() / (1 + recorded.detach().abs()))[mask]
    return float(found.max()) if found.numel() else 0.0


def check_first_update(
    logp: Tensor,
    recorded: Tensor,
    mask: Tensor,
    dtype: torch.dtype,
    diagnose: Callable[[Tensor, Close], str] = lambda recorded, close: "",
    names: EvaluationNames = EvaluationNames(),
    clip_range: ClipRange | None = None,
) -> float:
    """Return the deviation of ℓ_θ [B, J] from the recorded ℓ. Raise FirstUpdateError if it exceeds float error.

    diagnose: (recorded, close) -> the cause and what to do, or "". It is called only before the error is raised.
    clip_range: the range of the objective that computes its ratio from the two; default: they are in no ratio.
    """

    def float_error(one: Tensor, other: Tensor) -> bool:
        return deviation(one, other, mask) <= TOLERANCE[dtype]

    def in_range(one: Tensor, other: Tensor) -> bool:
        return clip_range is None or clip_range.excursion(one, other) <= RANGE_SHARE * clip_range.size

    worst = deviation(logp, recorded, mask)
    if not float_error(logp, recorded):
        found, remedy = f"(float error for {dtype} stays below {TOLERANCE[dtype]:.0e})", ""
    elif clip_range is not None and not in_range(logp, recorded):
        excursion, remedy = clip_range.excursion(logp, recorded), clip_range.remedy
        found = (
            f"(a ratio that should be 1 is off by {excursion:.2e}, and the objective clips at {clip_range.size:.2e}, of which "
            f"float error may take up {RANGE_SHARE:.0%})"
        )
    else:
        return worst
    cause = diagnose(recorded, lambda one, other: float_error(one, other) and in_range(one, other))
    raise FirstUpdateError(
        f"on the first update of a step {names.one} differs from {names.other} by {worst:.2e} of 1 + |ℓ| {found}, so ratios "
        f"and KL would be wrong. {cause or UNKNOWN_CAUSE}{remedy and '. ' + remedy}"
    )


UNKNOWN_CAUSE = (
    "Likely causes: dropout or another train-mode layer is active; guidance differs between rollout and likelihood; the "
    "forward pass runs in another precision than the rollout (model.dtype, an outer autocast); an attention backend whose "
    "result depends on the batch shape; weights changed between rollout and update"
)
