"""Samples that another engine drew than the network that is trained: how far the two are apart, and what makes up for it.

The engine draws from q, the network under the same weights is π, and the two differ by kernels, precision and rounding.
With a factor w = π/q for each token the gradient of a token's loss is, given what came before it, the one of samples of π:
E_q[(π/q) A ∇log π] = E_π[A ∇log π]. Truncated at C its variance is bounded (Ionides, 2008); against engines it was proposed
by Yao et al., *Your efficient RL framework secretly brings you off-policy RL training* (2025; *On the rollout-training
mismatch in modern RL systems*, NeurIPS 2025 workshop on efficient reasoning). The factors are of tokens: that the prefixes
too were drawn from q is not made up for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from difrl.data.rollout import Rollout
from difrl.policies.errors import ModelError

MISMATCH, CORRECTION = "rollout/mismatch", "rollout/correction"


def correct_rollout(rollout: Rollout, here: Tensor, most: float) -> Rollout:
    """The samples of an engine, as samples of the network.

    here [B, J]: ℓ under the weights that drew, by the network. The tape's `log_prob`, which the engine gave, becomes that,
    and `correction` is min(exp(ℓ_here − ℓ_engine), most). The measures are means over each sample's tokens: of
    |ℓ_here − ℓ_engine|, and of the factor. ModelError: log-probabilities of the engine that are not finite.
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
    tape = {**rollout.replay_data, "log_prob": here, "correction": weight}
    return replace(rollout, replay_data=tape, measures={**rollout.measures, **measures})
