"""From samples to the rewards that are learnt from: a recipe's rewards built, called, combined, shaped and summed."""

from __future__ import annotations

from difrl.scoring.scorer import SHIPPED_OPTIONS, Scorer, build_reward, modality_mismatch, score

__all__ = ["SHIPPED_OPTIONS", "Scorer", "build_reward", "modality_mismatch", "score"]
