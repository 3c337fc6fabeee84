"""Importance weights that correct samples drawn by another engine.

The engine draws from q, the network under the same weights is π, and the two differ by kernels, precision and rounding.
A factor w = π/q for each token corrects the gradient of the token's loss, given the tokens before it:
E_q[(π/q) A ∇log π] = E_π[A ∇log π]. Truncation at C bounds its variance (Ionides, 2008). Yao et al. proposed it for engines:
*Your efficient RL framework secretly brings you off-policy RL training* (2025; *On the rollout-training mismatch in modern
RL systems*, NeurIPS 2025 workshop on efficient reasoning). The factors are per token; they do not correct for prefixes that
were drawn from q.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from difrl.data.rollout import Rollout
from difrl.policies.errors import ModelError

MISMATCH, CORRECTION = "rollout/mismatch", "rollout/correction"


def correct_rollout(rollout: Rollout, here: Tensor, most: float) -> Rollout:
    """Return the rollout with importance weights, as a rollout of the network.

    Args:
      rollout: samples of the engine, whose `log_prob` is that of the engine.
      here: ℓ [B, J] by the network under the weights that drew. It replaces `log_prob`.
      most: upper bound of a weight; `correction` is min(exp(ℓ_here − ℓ_engine), most).

    The new measures are means over each sample's tokens: of |ℓ_here − ℓ_engine|, and of the weight. Raise ModelError if a
    log-probability of the engine is not finite.
    """
    mask, engine = rollout.replay_data["mask"], rollout.replay_data["log_prob"]
    if broken := (mask & ~engine.isfinite()).any(dim=1).nonzero().flatten().tolist():
        raise ModelError(
            f"the engine's log-probabilities are not finite for prompt {broken[0]} ({len(broken)} of {len(mask)}); its weights "
            "may have diverged, or its precision overflows: try model.dtype: float32, or generation.engine: transformers"
        )
    apart = torch.where(mask, here - engine, 0.0)
    weight = torch.where(mask, apart.exp().clamp(max=most), 1.0)
    count = mask.sum(dim=1).clamp(min=1)
    measures = {
        MISMATCH: apart.abs().sum(dim=1) / count,
        CORRECTION: torch.where(mask, weight, 0.0).sum(dim=1) / count,
    }
    replay_data = {**rollout.replay_data, "log_prob": here, "correction": weight}
    return replace(rollout, replay_data=replay_data, measures={**rollout.measures, **measures})
