"""Anchors, which pull θ towards other weights, and the snapshots that anchors and ratios refer to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from difrl.config.schema.base import Section
from difrl.config.schema.schedules import (
    AnchorCoefficient,
    RewardAdaptiveCoefficient,
    ScheduleConfig,
    build_coefficient,
    value_range,
)
from difrl.config.schema.training import TrainConfig

if TYPE_CHECKING:
    from difrl.core import Coefficient

DistributionDivergence = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "alpha", "hellinger", "total_variation", "chi_squared"
]
"""Divergences between the distributions of a token."""
DivergenceName = Literal["velocity", "weighted", "gaussian", "k1", "k2", "k3", DistributionDivergence]


class AnchorConfig(Section):
    """A KL-like pull towards other weights."""

    to: str = Field("base", description="base, or the name of a snapshot or teacher")
    divergence: DivergenceName = Field(
        "velocity",
        description="weighted: the distance of outputs in the weighting and reduction of a forward likelihood; reverse_kl "
        "and those after it: between the distributions of a token",
    )
    alpha: float = Field(0.5, description="parameter of the alpha-divergence")
    vocabulary: Literal["full", "sampled"] = Field(
        "full", description="divergence of distributions: over the full vocabulary, or estimated from the sampled token"
    )
    samples: Literal["own", "rehearsal"] = Field(
        "own", description="samples on which the divergence is measured: those of the step, or those of rehearsal"
    )
    place: Literal["loss", "reward", "decision"] = Field(
        "loss",
        description="reward: k1 of the recorded decisions, summed over a sample, is subtracted from its reward; decision: "
        "the k1 of each decision is subtracted from the advantage of that decision alone",
    )
    centred: bool = Field(
        False,
        description="with place: decision: k1 minus its expectation over the vocabulary; this lowers the variance of the "
        "gradient and keeps its mean (arXiv:2605.07865)",
    )
    coefficient: AnchorCoefficient = 1.0
    measure: bool = Field(
        False,
        description="true: kl/ANCHOR is measured in steps with a coefficient of 0 too, which costs an evaluation of the anchor",
    )
    guidance: float | None = Field(
        None, ge=1, description="guidance scale of the anchor's prediction; default: the same as for the likelihood"
    )

    @model_validator(mode="after")
    def _check_place(self) -> AnchorConfig:
        if self.place != "loss" and isinstance(self.coefficient, RewardAdaptiveCoefficient):
            raise ValueError(
                "a reward_adaptive coefficient needs advantages, which are computed from the rewards that this anchor is "
                "subtracted from; set a number, a schedule or target_kl, or place: loss"
            )
        return self

    @property
    def is_evaluated(self) -> bool:
        """Whether any step of a run may evaluate it."""
        return self.measure or any(level != 0 for level in value_range(self.coefficient))

    @property
    def label(self) -> str:
        """Name in metrics: the snapshot, with the guidance scale and samples where the anchor sets them."""
        guided = self.to if self.guidance is None else f"{self.to}-cfg{self.guidance:g}"
        return guided if self.samples == "own" else f"{guided}-{self.samples}"


class SnapshotSection(Section):
    """Base of the sections that determine how a snapshot follows θ."""

    kind: str

    @property
    def value_range(self) -> tuple[float, ...]:
        """Numbers between which the decay stays, where the recipe chooses them."""
        return ()

    def build(self, train: TrainConfig) -> Coefficient:
        """Return the decay at each step."""
        raise NotImplementedError(f"{type(self).__name__} must define build(train)")


class DecaySnapshot(SnapshotSection):
    """snapshot ← decay · snapshot + (1 − decay) · θ, once a step."""

    kind: Literal["decay"] = "decay"
    decay: ScheduleConfig = Field(
        0.0, description="0 copies the weights, 0.99 follows them slowly; schedules count optimizer updates"
    )

    @property
    def value_range(self) -> tuple[float, ...]:
        return value_range(self.decay)

    def build(self, train: TrainConfig) -> Coefficient:
        from difrl.core import InUpdates

        updates = train.updates_per_step
        return InUpdates(build_coefficient(self.decay, train.steps * updates), updates)


class AverageSnapshot(SnapshotSection):
    """An exponential average that follows θ fast at first: its decay is min((1 + n) / (10 + n), decay) at update n
    (arXiv:2505.05470).
    """

    kind: Literal["average"]
    decay: float = Field(0.99, ge=0, lt=1, description="the largest decay")
    every: int = Field(1, gt=0, description="optimizer updates between two moves")

    def build(self, train: TrainConfig) -> Coefficient:
        from difrl.core import Average

        return Average(self.decay, self.every, train.updates_per_step)


class SoupSnapshot(SnapshotSection):
    """The average of the initial weights and of those at regular intervals (arXiv:2411.01798)."""

    kind: Literal["soup"]
    every: int = Field(gt=0, description="steps between the weights that are averaged")

    def build(self, train: TrainConfig) -> Coefficient:
        from difrl.core import Soup

        return Soup(self.every)


class ResetSnapshot(SnapshotSection):
    """The weights after the latest multiple of `every` steps (arXiv:2505.24864)."""

    kind: Literal["reset"]
    every: int = Field(gt=0, description="steps between resets")

    def build(self, train: TrainConfig) -> Coefficient:
        from difrl.core import Reset

        return Reset(self.every)


def _snapshot_kind(value: Any) -> str:
    if isinstance(value, SnapshotSection):
        return value.kind
    return str(value.get("kind", "decay")) if isinstance(value, Mapping) else "decay"


SnapshotConfig = Annotated[
    Annotated[DecaySnapshot, Tag("decay")]
    | Annotated[AverageSnapshot, Tag("average")]
    | Annotated[SoupSnapshot, Tag("soup")]
    | Annotated[ResetSnapshot, Tag("reset")],
    Discriminator(_snapshot_kind),
]
