"""Prompts, rewards, and how rewards of a group become advantages."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from difrl.config.section import Section


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


class RewardConfig(Section):
    """A reward by name, or by import path."""

    name: str | None = Field(None, description="a name that `difrl rewards` lists")
    import_: str | None = Field(
        None, alias="import", description="package.module.name of a function or a class, instead of a name"
    )
    weight: float = Field(
        1.0, description="in the weighted sum; 0: only reported, as in distillation, which learns from anchors alone"
    )
    options: dict[str, Any] = Field({}, description="keyword arguments of the reward")
    on_error: Literal["raise", "retry", "drop"] = Field(
        "raise",
        description="stop the run; call again, then stop; or leave out the samples that break it, counted in invalid/NAME",
    )
    retries: int = Field(3, gt=0, description="of on_error: retry, after pauses of 1, 2, 4 … seconds")
    timeout: float | None = Field(None, gt=0, description="seconds for a call, after which it has failed; null: none")

    @model_validator(mode="after")
    def _one_source(self) -> RewardConfig:
        if (self.name is None) == (self.import_ is None):
            raise ValueError("give a reward either a name or an import, e.g. `- name: geneval`")
        return self

    @property
    def label(self) -> str:
        """The name used in metrics."""
        return self.name or str(self.import_).replace(":", ".").rpartition(".")[2]


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
    negative: float = Field(1.0, ge=0, description="factor of negative advantages; positive: 0 learns from these alone")


class CollectConfig(Section):
    """Draw again until groups differ in reward (dynamic sampling, arXiv:2503.14476)."""

    max_draws: int = Field(1, gt=0, description="draws at most; 1 keeps whatever the first draw gave")
    by: str | None = Field(None, description="the reward in which groups must differ; default: the weighted sum of all")
