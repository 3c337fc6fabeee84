"""Prompts, and how rewards of a group become advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from difrl.config.schema.base import Section
from difrl.config.schema.rewards import RewardConfig

if TYPE_CHECKING:
    from difrl.core import AdvantageEstimator


class DataConfig(Section):
    """Prompts, and how many samples are drawn for each."""

    train: str = Field(description="a .txt or .jsonl file, or a built-in set such as shapes:train")
    rows: Literal["prompts", "pairs", "samples"] = Field(
        "prompts",
        description="of train: prompts to draw samples for, or samples that exist: preference pairs, or samples with rewards",
    )
    cache: int = Field(1024, ge=0, description="samples of the file whose latents or tokens are kept in memory")
    evaluation: str | None = Field(None, description="prompts that are never trained on; default: none")
    prompts_per_step: int = Field(12, gt=0, description="groups of a step, over all processes")
    group_size: int = Field(12, gt=0, description="samples for each prompt, which are compared with each other")
    negative: str = Field("", description="negative prompt of guidance, where the prompt's row has none")


class RehearsalConfig(Section):
    """Samples of a file that anchors with samples: rehearsal are measured on, beside those of the step (arXiv:2509.07430)."""

    train: str = Field(
        description="a .jsonl file as data.rows: samples reads it, of samples drawn from what these anchors hold θ to"
    )
    prompts_per_step: int = Field(8, gt=0, description="prompts of a step, over all processes and updates")
    group_size: int = Field(1, gt=0, description="samples for each of these prompts")
    cache: int = Field(1024, ge=0, description="samples of the file whose latents or tokens are kept in memory")

    @property
    def rows(self) -> str:
        """How the file is read: the rewards it must give are not used."""
        return "samples"


class AdvantageConfig(Section):
    """How rewards of a group become advantages."""

    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    std: Literal["group", "global", "beta", "none"] = Field(
        "group", description="what they are divided by; beta: for rewards in [0, 1] (arXiv:2506.02864)"
    )
    clip: float | None = Field(None, gt=0, description="advantages are clipped to ± this")
    scale: float = Field(1.0, gt=0, description="advantages are multiplied by this after clipping")
    normalise: Literal["total", "each"] = Field(
        "total", description="each: every reward by itself, before they are summed by weight (arXiv:2601.05242)"
    )
    positive: float = Field(1.0, ge=0, description="factor of positive advantages (arXiv:2506.01347)")
    negative: float = Field(
        1.0,
        ge=0,
        description="factor of negative advantages; positive: 0 learns from these alone, and with rewards of ±1, positive: ρ₁ "
        "and negative: 1 − ρ₁ correct for false negatives at rate ρ₁ (arXiv:2510.00915)",
    )

    def build(self, rewards: Sequence[RewardConfig]) -> AdvantageEstimator:
        """Return the estimator of a run with these rewards."""
        from difrl.core import PerRewardAdvantage, TotalRewardAdvantage

        if self.normalise == "total":
            return TotalRewardAdvantage(self.baseline, self.std, self.clip, self.scale, self.positive, self.negative)
        columns = {reward.label: reward.column for reward in rewards}
        return PerRewardAdvantage(columns, self.baseline, self.clip, self.scale, self.positive, self.negative)


class CollectConfig(Section):
    """Draw again until groups differ in reward (dynamic sampling, arXiv:2503.14476)."""

    max_draws: int = Field(1, gt=0, description="draws at most; 1 keeps whatever the first draw gave")
    by: str | None = Field(None, description="the reward in which groups must differ; default: the weighted sum of all")
