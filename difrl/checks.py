"""The check of every run that the first update of a step starts from ratio 1.

If the likelihoods under training differ from those of the sampler although the weights are the same, every ratio, clip and
KL is wrong and nothing else would show it. So a few samples are compared instead of assuming it.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLES = 4
"""Samples compared in each step and process."""

# Float error of a likelihood evaluated twice in batches of different shape, relative to 1 + |ℓ|.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


class FirstUpdateError(RuntimeError):
    """The policy under training does not agree with the one that drew the samples."""


def check_first_update(logp: Tensor, recorded: Tensor, mask: Tensor, dtype: torch.dtype) -> float:
    """The largest deviation of ℓ_θ [B, J] from what was recorded, relative to 1 + |ℓ|; raises if it is no float error."""
    deviation = ((logp.detach() - recorded).abs() / (1 + recorded.abs()))[mask]
    worst = float(deviation.max()) if deviation.numel() else 0.0
    if not worst <= TOLERANCE[dtype]:
        raise FirstUpdateError(
            f"on the first update of a step ℓ_θ differs from the sampler's by {worst:.2e} of 1 + |ℓ| (float error for "
            f"{dtype} stays below {TOLERANCE[dtype]:.0e}), so ratios and KL would be wrong. Likely causes: dropout or "
            "another train-mode layer is active; guidance differs between rollout and likelihood; the forward pass runs in "
            "another precision than the rollout (model.dtype, an outer autocast); an attention backend whose result depends "
            "on the batch shape; weights changed between rollout and update"
        )
    return worst
