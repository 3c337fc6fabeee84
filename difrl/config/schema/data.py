"""Prompts and recorded samples, advantages, and dynamic sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from difrl.config.schema.base import PathText, Section
from difrl.config.schema.rewards import RewardConfig

if TYPE_CHECKING:
    from difrl.core import AdvantageEstimator


class DataConfig(Section):
    """Prompts, and the number of samples drawn for each."""

    train: PathText = Field(description="a .txt or .jsonl file, or a built-in set such as shapes:train")
    rows: Literal["prompts", "pairs", "samples"] = Field(
        "prompts",
        description="content of train: prompts to sample for, or recorded samples: preference pairs, or samples with rewards",
    )
    cache: int = Field(1024, ge=0, description="recorded samples whose latents or tokens are kept in memory")
    evaluation: PathText | None = Field(None, description="prompts that are never trained on; default: none")
    prompts_per_step: int = Field(12, gt=0, description="groups a step, over all processes")
    group_size: int = Field(12, gt=0, description="samples for each prompt; they are compared with each other")
    negative: str = Field("", description="negative prompt of guidance, for prompts whose row has none")


class RehearsalConfig(Section):
    """Recorded samples on which anchors with samples: rehearsal are measured, beside those of the step (arXiv:2509.07430)."""

    train: PathText = Field(
        description="a .jsonl file in the format of data.rows: samples; the samples were drawn from the target of these anchors"
    )
    prompts_per_step: int = Field(8, gt=0, description="prompts a step, over all processes and updates")
    group_size: int = Field(1, gt=0, description="samples for each of these prompts")
    cache: int = Field(1024, ge=0, description="recorded samples whose latents or tokens are kept in memory")

    @property
    def rows(self) -> str:
        """The value of data.rows with which the file is read; its rewards are required and not used."""
        return "samples"


class AdvantageConfig(Section):
    """The computation of advantages from the rewards of a group."""

    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    std: Literal["group", "global", "beta", "none"] = Field(
        "group", description="divisor; beta: for rewards in [0, 1] (arXiv:2506.02864)"
    )
    clip: float | None = Field(None, gt=0, description="advantages are clipped to ± this")
    scale: float = Field(1.0, gt=0, description="advantages are multiplied by this after clipping")
    normalise: Literal["total", "each"] = Field(
        "total", description="each: every reward is normalised separately, then summed by weight (arXiv:2601.05242)"
    )
    positive: float = Field(1.0, ge=0, description="factor of positive advantages (arXiv:2506.01347)")
    negative: float = Field(
        1.0,
        ge=0,
        description="factor of negative advantages; positive: 0 learns from these alone; with rewards of ±1, positive: ρ₁ "
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
    """Dynamic sampling: groups are drawn again until their rewards differ (arXiv:2503.14476)."""

    max_draws: int = Field(1, gt=0, description="maximal number of draws; 1 keeps the first draw")
    by: str | None = Field(None, description="reward that must differ within a group; default: the weighted sum of all")
