"""The check of every run that the first update of a step starts from ratio 1.

If the likelihoods under training differ from those of the sampler although the weights are the same, every ratio, clip and
KL is wrong and nothing else would show it. So a few samples are compared instead of assuming it:

* what was recorded while sampling, with the same evaluated again under the weights that drew (θ, or another snapshot);
* ℓ_θ, with every reference whose weights are θ's at this moment: old, where it is a copy taken at the end of a step. A
  reference that lags by design (a decay above 0, another guidance scale) need not agree and is left alone.

Only when a comparison fails is more evaluated, to say why.
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

Close = Callable[[Tensor, Tensor], bool]
"""Whether two evaluations of ℓ [B, J] differ by float error only."""


class FirstUpdateError(UserError):
    """The policy under training does not agree with the one that drew the samples."""


@dataclass(frozen=True)
class EvaluationNames:
    """Two evaluations of the same decisions that must agree, in the words of the message."""

    one: str = "ℓ_θ"
    other: str = "the sampler's"


def deviation(logp: Tensor, recorded: Tensor, mask: Tensor) -> float:
    """max |ℓ − ℓ_recorded| / (1 + |ℓ_recorded|) over what counts; NaN where something is not a number, 0 where nothing counts."""
    found = ((logp.detach() - recorded.detach()).abs() / (1 + recorded.detach().abs()))[mask]
    return float(found.max()) if found.numel() else 0.0


def check_first_update(
    logp: Tensor,
    recorded: Tensor,
    mask: Tensor,
    dtype: torch.dtype,
    diagnose: Callable[[Tensor, Close], str] = lambda recorded, close: "",
    names: EvaluationNames = EvaluationNames(),
) -> float:
    """The deviation of ℓ_θ [B, J] from what was recorded; raises FirstUpdateError if it is no float error.

    `diagnose(recorded, close)` is asked only then: the cause it found, with what to do, or "".
    """
    worst, tolerance = deviation(logp, recorded, mask), TOLERANCE[dtype]
    if worst <= tolerance:
        return worst
    cause = diagnose(recorded, lambda one, other: deviation(one, other, mask) <= tolerance)
    raise FirstUpdateError(
        f"on the first update of a step {names.one} differs from {names.other} by {worst:.2e} of 1 + |ℓ| (float error for "
        f"{dtype} stays below {tolerance:.0e}), so ratios and KL would be wrong. {cause or UNKNOWN}"
    )


UNKNOWN = (
    "Likely causes: dropout or another train-mode layer is active; guidance differs between rollout and likelihood; the "
    "forward pass runs in another precision than the rollout (model.dtype, an outer autocast); an attention backend whose "
    "result depends on the batch shape; weights changed between rollout and update"
)
