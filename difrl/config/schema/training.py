"""Optimisation, evaluation, the guard and checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from difrl.config.schema.base import Section
from difrl.config.schema.schedules import ScheduleConfig


class TrainConfig(Section):
    """The optimisation."""

    steps: int = Field(100, gt=0, description="a step is one rollout with its updates")
    updates_per_step: int = Field(1, gt=0, description="optimizer updates into which a rollout is divided")
    micro_batch: int = Field(
        64, gt=0, description="decisions evaluated with gradient at once; guidance doubles the model's batch"
    )
    aggregation: Literal["decision", "sample", "length"] = Field(
        "decision",
        description="unit of equal weight in the loss: every decision (arXiv:2503.14476), every sample (2402.03300), or "
        "every decision over samples × their greatest length (2503.20783)",
    )
    lr: ScheduleConfig = Field(1e-4, description="a number, or a schedule over train.steps")
    optimizer: Literal[
        "adamw",
        "adamw8bit",
        "adamw4bit",
        "adamw_fp8",
        "paged_adamw",
        "paged_adamw8bit",
        "lion",
        "lion8bit",
        "paged_lion8bit",
    ] = Field(
        "adamw",
        description="adamw of torch; adamw8bit, adamw4bit and adamw_fp8 of torchao, whose moments are stored in fewer bits; "
        "paged_… and lion… of bitsandbytes. A paged state moves to CPU memory while a GPU is full. lion steps by the sign "
        "of its one moment (arXiv:2302.06675): take an lr 3 to 10 times lower than for adamw, a weight_decay higher by the "
        "same factor, and betas [0.9, 0.99]",
    )
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False, description="betas of the optimizer")
    weight_decay: float = Field(0.0, ge=0, description="share of a weight that a step of lr 1 subtracts from it")
    max_grad_norm: float = Field(1.0, gt=0)
    restart_every: int | None = Field(
        None, gt=0, description="steps between resets of the optimizer's moments, as when ProRL resets its reference"
    )
    threads: int | None = Field(None, gt=0, description="CPU threads a process; default: torch's own choice")


class EvaluationConfig(Section):
    """Evaluation on prompts that are never trained on."""

    every: int = Field(20, ge=0, description="steps between evaluations; 0: never, not even before and after")
    images: int = Field(256, gt=0, description="samples of an evaluation during the run")
    final_images: int | None = Field(None, gt=0, description="samples before and after a run; default: images")
    snapshot: str = Field(
        "current",
        description="weights that are evaluated, saved as the result, and opened by difrl sample: current, or the name of a "
        "snapshot, such as an average",
    )
    steps: int | None = Field(None, gt=1, le=10_000, description="denoising steps; default: rollout.steps")
    temperature: float | None = Field(
        None, ge=0, description="temperature of texts; 0: the likeliest token; default: generation.temperature"
    )
    diversity: list[str] = Field(
        ["pixels", "ngrams"],
        description="features whose distance within a prompt is measured: pixels or judge of images, ngrams of texts, "
        "or module:function; features of the other modality are skipped",
    )
    show: int = Field(6, ge=0, description="prompts of the sample grid")
    columns: int = Field(8, gt=0, description="samples for each prompt of the grid")
    rlg: list[float] = Field(
        [0.0, 0.5, 1.0, 1.5, 2.0], description="RLG weights of the sweep at the end of the run; []: no sweep"
    )


class GuardConfig(Section):
    """The reaction to a watched reward or diversity that falls while the trained reward rises (difrl/training/guard.py)."""

    action: Literal["warn", "stop", "rollback"] = Field(
        "rollback", description="warn, end the run (stop), or end it with the weights of its best evaluation (rollback)"
    )
    margin: float = Field(2.0, ge=0, description="standard errors beyond which a change counts as a fall or a rise")
    diversity: float | None = Field(
        0.25,
        ge=0,
        lt=1,
        description="share of its highest value that diversity may lose; null: diversity is not guarded",
    )
    rewards: list[str] | None = Field(None, description="watched rewards that are guarded; default: all")
    patience: int = Field(2, gt=0, description="consecutive evaluations with a fall before the action")


class CheckpointConfig(Section):
    every: int = Field(
        50, ge=0, description="steps between checkpoints; 0: only at the end, on Ctrl-C or failure, and for a guard"
    )
    keep: int = Field(2, gt=0, description="number of checkpoints to keep, beside the best one under a guard")
