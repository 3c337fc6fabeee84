"""Rewards of samples: a recipe's rewards are built, called, combined, shaped and summed."""

from __future__ import annotations

from difrl.scoring.scorer import SHIPPED_OPTIONS, Scorer, build_reward, modality_mismatch, score_rollout

__all__ = ["SHIPPED_OPTIONS", "Scorer", "build_reward", "modality_mismatch", "score_rollout"]
