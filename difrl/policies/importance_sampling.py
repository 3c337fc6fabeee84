"""Importance weights that correct samples drawn by another engine, or by the network in another precision.

The engine draws from q, the network under the same weights is π, and the two differ by kernels, precision and rounding.
A factor w = π/q for each decision (a token, a denoising step) corrects the gradient of its loss, given the decisions before it:
E_q[(π/q) A ∇log π] = E_π[A ∇log π]. Truncation at C bounds its variance (Ionides, 2008). Yao et al. proposed it for engines:
*Your efficient RL framework secretly brings you off-policy RL training* (2025; *On the rollout-training mismatch in modern
RL systems*, NeurIPS 2025 workshop on efficient reasoning), and for quantised ones in FlashRL (*8Bit rollouts, full power RL*,
2025). The factors are per decision; they do not correct for prefixes, or noisier latents, that were drawn from q. The ℓ of a
denoising step is averaged over the latent's dimensions unless `likelihood.reduce` is sum, and the factor with it, as ρ is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from difrl.config import RunConfig
from difrl.data.rollout import Rollout
from difrl.policies.errors import ModelError

MISMATCH, CORRECTION = "rollout/mismatch", "rollout/correction"


def get_correction(config: RunConfig) -> float | None:
    """Return the upper bound of an importance weight; None if the samples of training are not corrected.

    Forward likelihoods evaluate clean samples at noise of their own. They use no density of the sampler, so there is nothing to
    correct by.
    """
    other_precision = config.rollout.precision != "same"
    match config.likelihood.kind:
        case "tokens":
            return config.generation.correction if other_precision or config.generation.engine == "vllm" else None
        case "reverse":
            return config.rollout.correction if other_precision else None
        case _:
            return None


def correct_rollout(rollout: Rollout, mask: Tensor, here: Tensor, most: float) -> Rollout:
    """Return the rollout with importance weights, as a rollout of the network.

    Args:
      rollout: samples whose `log_prob` [B, J] is that of the engine.
      mask: True where a decision counts, [B, J] bool.
      here: ℓ [B, J] by the network under the weights that drew. It replaces `log_prob`.
      most: upper bound of a weight; `correction` is min(exp(ℓ_here − ℓ_engine), most).

    The new measures are means over each sample's decisions: of |ℓ_here − ℓ_engine|, and of the weight. Raise ModelError if a
    log-probability of the engine is not finite.
    """
    engine = rollout.replay_data["log_prob"]
    if broken := (mask & ~engine.isfinite()).any(dim=1).nonzero().flatten().tolist():
        raise ModelError(
            f"the engine's log-probabilities are not finite for prompt {broken[0]} ({len(broken)} of {len(mask)}); its weights "
            "may have diverged, or its precision overflows: try model.dtype: float32, generation.engine: transformers, or "
            "rollout.precision: same"
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
