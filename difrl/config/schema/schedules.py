"""Numbers that change over a run: schedules, and coefficients that react to measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from difrl.config.schema.base import Section

if TYPE_CHECKING:
    from difrl.core import Coefficient


class CoefficientSection(Section):
    """Base of the sections that stand for a number which changes over the run."""

    kind: str

    @property
    def value_range(self) -> tuple[float, ...]:
        """Numbers between which the value stays; for a controller, the number at which it starts."""
        raise NotImplementedError(f"{type(self).__name__} must define value_range")

    def build(self, total: int) -> Coefficient:
        """Return the coefficient. A schedule without a length of its own spans the run, `total` of what it counts."""
        raise NotImplementedError(f"{type(self).__name__} must define build(total)")


def value_range(value: float | CoefficientSection) -> tuple[float, ...]:
    """Return the numbers between which a value stays: the number itself, or the range of its section."""
    return value.value_range if isinstance(value, CoefficientSection) else (float(value),)


def build_coefficient(value: float | CoefficientSection, total: int) -> Coefficient:
    """Return the coefficient of a number, which is constant, or of a section (`CoefficientSection.build`)."""
    from difrl.core import Constant

    return value.build(total) if isinstance(value, CoefficientSection) else Constant(float(value))


class ConstantSchedule(CoefficientSection):
    kind: Literal["constant"] = "constant"
    value: float
    warmup: int = Field(0, ge=0, description="steps over which the value rises linearly from 0")

    @property
    def value_range(self) -> tuple[float, ...]:
        return (self.value,)

    def build(self, total: int) -> Coefficient:
        from difrl.core import Constant

        return Constant(self.value, self.warmup)


class RampSchedule(CoefficientSection):
    """Base of the schedules that go from one number to another."""

    start: float
    end: float
    steps: float | None = Field(
        None, gt=0, description="from start to end; default: to the last step of the run, after warmup and hold"
    )
    warmup: int = Field(0, ge=0, description="steps over which the value rises linearly from 0 to start")
    hold: int = Field(0, ge=0, description="steps at start, after the warm-up")

    @property
    def value_range(self) -> tuple[float, ...]:
        return (self.start, self.end)

    def count_steps(self, total: int) -> float:
        """Return the number of steps from start to end, in a run of `total` steps.

        By default the last step has the end value. Without warm-up and hold the step after it would have it, as in
        earlier versions, whose runs keep their numbers.
        """
        if self.steps is not None:
            return self.steps
        before = self.warmup + self.hold
        return max(1, total - before - 1) if before else total


class LinearSchedule(RampSchedule):
    kind: Literal["linear"]

    def build(self, total: int) -> Coefficient:
        from difrl.core import Linear

        return Linear(self.start, self.end, self.count_steps(total), self.warmup, self.hold)


class CosineSchedule(RampSchedule):
    kind: Literal["cosine"]

    def build(self, total: int) -> Coefficient:
        from difrl.core import Cosine

        return Cosine(self.start, self.end, self.count_steps(total), self.warmup, self.hold)


def _schedule_kind(value: Any) -> str:
    """Return the tag of a number or a section, so that an error concerns that form alone."""
    if isinstance(value, CoefficientSection):
        return value.kind
    return str(value.get("kind", "constant")) if isinstance(value, Mapping) else "number"


ScheduleConfig = Annotated[
    Annotated[float, Tag("number")]
    | Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[LinearSchedule, Tag("linear")]
    | Annotated[CosineSchedule, Tag("cosine")],
    Discriminator(_schedule_kind),
]


class TargetKLCoefficient(CoefficientSection):
    """A controller of the step's mean divergence D: e = clip(D/target − 1, ±bound), value ← value · (1 + gain · e)
    (arXiv:1909.08593).
    """

    kind: Literal["target_kl"]
    start: float = Field(gt=0, description="value of the first step")
    target: float = Field(gt=0, description="divergence to keep, in the units of kl/ANCHOR")
    gain: float = Field(0.1, gt=0, le=1, description="how fast the value follows")
    bound: float = Field(0.2, gt=0, lt=1, description="largest relative error that counts")

    @property
    def value_range(self) -> tuple[float, ...]:
        return (self.start,)

    def build(self, total: int) -> Coefficient:
        from difrl.core import TargetKL

        return TargetKL(self.start, self.target, self.gain, self.bound)


class RewardAdaptiveCoefficient(CoefficientSection):
    """A coefficient for each sample: floor + (value − floor) · r̃, r̃ = clip(A, ±limit) / (2 limit) + ½ (arXiv:2603.14128)."""

    kind: Literal["reward_adaptive"]
    value: ScheduleConfig = Field(description="for the best samples")
    floor: float = Field(1e-4, ge=0, description="for the worst samples")
    limit: float = Field(5.0, gt=0, description="advantage at which a sample counts as best")

    @property
    def value_range(self) -> tuple[float, ...]:
        return (self.floor, *value_range(self.value))

    def build(self, total: int) -> Coefficient:
        from difrl.core import RewardAdaptive

        return RewardAdaptive(build_coefficient(self.value, total), self.floor, self.limit)

    @model_validator(mode="after")
    def _check_floor(self) -> RewardAdaptiveCoefficient:
        if self.floor > min(value_range(self.value)):
            raise ValueError(f"floor is {self.floor:g}, expected at most the value, {min(value_range(self.value)):g}")
        return self


AnchorCoefficient = Annotated[
    Annotated[float, Tag("number")]
    | Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[LinearSchedule, Tag("linear")]
    | Annotated[CosineSchedule, Tag("cosine")]
    | Annotated[TargetKLCoefficient, Tag("target_kl")]
    | Annotated[RewardAdaptiveCoefficient, Tag("reward_adaptive")],
    Discriminator(_schedule_kind),
]


class ThresholdWeight(CoefficientSection):
    """A Lagrange multiplier λ as the weight +λ or −λ. It keeps the mean m of its reward on one side (arXiv:2310.04373).

    at_least: λ ← λ + rate · (at_least − m);  at_most: λ ← λ + rate · (m − at_most);  kept in [0, highest].
    """

    kind: Literal["threshold"]
    at_least: float | None = Field(None, description="the mean is kept at this or above, with weight λ")
    at_most: float | None = Field(None, description="the mean is kept at this or below, with weight −λ")
    start: float = Field(1.0, ge=0, description="λ of the first step")
    rate: float = Field(0.1, gt=0, description="how fast λ follows, for each unit of the reward")
    highest: float = Field(10.0, gt=0, description="largest λ")

    @model_validator(mode="after")
    def _check_side(self) -> ThresholdWeight:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give either at_least or at_most")
        if self.start > self.highest:
            raise ValueError(f"found start: {self.start:g} and highest: {self.highest:g}; start is at most highest")
        return self

    @property
    def threshold(self) -> float:
        threshold = self.at_most if self.at_least is None else self.at_least
        assert threshold is not None
        return threshold

    @property
    def value_range(self) -> tuple[float, ...]:
        return (self.start if self.at_least is not None else -self.start,)

    def build(self, total: int) -> Coefficient:
        from difrl.core import LagrangeMultiplier

        return LagrangeMultiplier(self.start, self.threshold, self.at_least is not None, self.rate, self.highest)


RewardWeight = Annotated[
    Annotated[float, Tag("number")]
    | Annotated[ConstantSchedule, Tag("constant")]
    | Annotated[LinearSchedule, Tag("linear")]
    | Annotated[CosineSchedule, Tag("cosine")]
    | Annotated[ThresholdWeight, Tag("threshold")],
    Discriminator(_schedule_kind),
]
