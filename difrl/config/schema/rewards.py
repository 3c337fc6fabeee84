"""Sources, combination, shapes and weights of the rewards."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, SerializationInfo, field_serializer, field_validator, model_validator

from difrl.config.schema.base import Section, check_path
from difrl.config.schema.schedules import RewardWeight, ThresholdWeight, value_range

S = TypeVar("S", bound=Section)


class ClipShape(Section):
    """min(max(r, low), high)."""

    kind: Literal["clip"]
    low: float | None = Field(None, description="default: no bound")
    high: float | None = Field(None, description="default: no bound")

    @model_validator(mode="after")
    def _check_bounds(self) -> ClipShape:
        if self.low is None and self.high is None:
            raise ValueError("give low or high, or both")
        return _check_order(self, self.low, self.high)


class MinMaxShape(Section):
    """(r − low) / (high − low)."""

    kind: Literal["min_max"]
    low: float | None = Field(None, description="mapped to 0; default, together with high: the lowest of the group")
    high: float | None = Field(None, description="mapped to 1; default, together with low: the highest of the group")

    @model_validator(mode="after")
    def _check_bounds(self) -> MinMaxShape:
        if (self.low is None) != (self.high is None):
            raise ValueError("give low and high, or neither, for the range of each group")
        return _check_order(self, self.low, self.high)


class ParShape(Section):
    """Mean over reference samples of σ(r − r_ref), in (0, 1) (arXiv:2502.18770)."""

    kind: Literal["par"]


class LogSigmoidShape(Section):
    """log σ(r − r_ref), r_ref a quantile of the reference samples; sums act as a logical AND (arXiv:2402.00742)."""

    kind: Literal["log_sigmoid"]
    quantile: float | None = Field(
        0.85, ge=0, le=1, description="quantile of the rewards of the prompt's reference samples; null: their mean"
    )


class NoiseShape(Section):
    """(r − ρ₀) / (1 − ρ₀ − ρ₁), for a binary verifier with known error rates (arXiv:2510.00915)."""

    kind: Literal["noise"]
    false_positive: float = Field(ge=0, lt=1, description="ρ₀: rate of 1 among wrong samples")
    false_negative: float = Field(ge=0, lt=1, description="ρ₁: rate of 0 among right samples")

    @model_validator(mode="after")
    def _check_rates(self) -> NoiseShape:
        if self.false_positive + self.false_negative >= 1:
            raise ValueError(
                "the two rates sum to 1 or more, so the verifier carries no information, or the opposite of the truth; lower one"
            )
        return self


ShapeConfig = Annotated[ClipShape | MinMaxShape | ParShape | LogSigmoidShape | NoiseShape, Field(discriminator="kind")]


class SampledFrames(Section):
    """Some frames of each video, drawn by a hash of the video."""

    sample: int = Field(gt=0, description="number of frames, whose mean is the score")


class MemberConfig(Section):
    """A reward by name or by import path."""

    name: str | None = Field(None, description="a name listed by `difrl rewards`")
    import_: str | None = Field(
        None, alias="import", description="package.module.name of a function or a class, instead of a name"
    )
    label_: str | None = Field(
        None,
        alias="label",
        pattern=r"^[^/\s\x00-\x1f\x7f]+$",
        description="name in metrics; default: name, or the name of the callable",
    )
    options: dict[str, Any] = Field({}, description="keyword arguments of the reward")
    frames: Literal["mean", "worst"] | SampledFrames | None = Field(
        None,
        description="score of a video by a reward of images: mean or worst of its frames, or {sample: k}; default: mean, or "
        "the whole video for a reward that reads videos",
    )
    on_error: Literal["raise", "retry", "drop"] = Field(
        "raise",
        description="stop the run; call again, then stop; or leave out the samples that fail, counted in invalid/NAME",
    )
    retries: int = Field(
        3, gt=0, description="calls after the first with on_error: retry, after pauses of 1, 2, 4 … seconds"
    )
    timeout: float | None = Field(None, gt=0, description="seconds after which a call has failed; null: no limit")
    shape: ShapeConfig | None = Field(
        None, description="function of the reward, applied before the sum or the combination"
    )

    @field_validator("options")
    @classmethod
    def _expand_home(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {key: check_path(item) if _is_home(item) else item for key, item in options.items()}

    @field_serializer("options")
    def _dump_options(self, options: dict[str, Any], info: SerializationInfo) -> dict[str, Any]:
        if not info.context:
            return options
        paths = {key: item for key, item in options.items() if isinstance(item, str) and "/" in item}
        return {**options, **{key: info.context.resolve(path) for key, path in paths.items()}}

    @model_validator(mode="after")
    def _check_source(self) -> MemberConfig:
        if self._sources != 1:
            raise ValueError(f"give a reward either {self._choices}, e.g. `- name: geneval`")
        return self

    @property
    def _sources(self) -> int:
        return (self.name is not None) + (self.import_ is not None)

    @property
    def _choices(self) -> str:
        return "a name or an import"

    @property
    def label(self) -> str:
        """Name in metrics."""
        return self.label_ or self.name or str(self.import_).replace(":", ".").rpartition(".")[2]


def _is_home(option: object) -> bool:
    return isinstance(option, str) and option.startswith("~/")


_CALLED = ("options", "frames", "on_error", "retries", "timeout")
"""Keys that determine how a reward is built and called."""


class RewardConfig(MemberConfig):
    """A reward by name or by import path, or an ensemble of such rewards."""

    ensemble: list[MemberConfig] | None = Field(
        None, min_length=2, description="rewards that estimate the same quantity, instead of a name (arXiv:2310.02743)"
    )
    combine: Literal["mean", "worst", "uncertainty"] = Field(
        "mean", description="value of an ensemble: mean, lowest member, or mean minus penalty times variance"
    )
    penalty: float | None = Field(None, ge=0, description="penalty of combine: uncertainty")
    weight: RewardWeight = Field(
        1.0, description="weight in the sum; 0: only reported, as in distillation, which learns from anchors alone"
    )

    @property
    def _sources(self) -> int:
        return super()._sources + (self.ensemble is not None)

    @property
    def _choices(self) -> str:
        return "a name, an import or an ensemble"

    @property
    def label(self) -> str:
        return self.label_ or ("ensemble" if self.ensemble is not None else super().label)

    @model_validator(mode="after")
    def _check_combination(self) -> RewardConfig:
        if self.label == "mean":
            raise ValueError("reward/mean is the weighted sum of all; set another label")
        if self.ensemble is None and (self.combine != "mean" or self.penalty is not None):
            raise ValueError("combine and penalty belong to an ensemble; remove them")
        fields = MemberConfig.model_fields
        own = [name for name in _CALLED if getattr(self, name) != fields[name].default]
        if self.ensemble is not None and own:
            raise ValueError(f"an ensemble has no {', '.join(own)}; give them to its members")
        if (self.combine == "uncertainty") != (self.penalty is not None):
            raise ValueError("combine: uncertainty subtracts penalty times the variance; give both, or neither")
        labels = [member.label for member in self.ensemble or []]
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"members are called {', '.join(labels)}; give members with the same name different labels"
            )
        return self

    @property
    def members(self) -> list[MemberConfig]:
        """Members of the ensemble; for a plain reward, the reward itself."""
        return [self] if self.ensemble is None else self.ensemble

    @property
    def shapes(self) -> list[ShapeConfig]:
        """Shapes of the reward and of its members."""
        around = [] if self.ensemble is None else [self.shape]
        return [shape for shape in [*(member.shape for member in self.members), *around] if shape is not None]

    @property
    def compares(self) -> bool:
        """True if a shape compares with reference samples."""
        return any(shape.kind in ("par", "log_sigmoid") for shape in self.shapes)

    @property
    def column(self) -> str:
        """Name of the metric that the weight multiplies."""
        return f"{'shaped' if self.shapes else 'reward'}/{self.label}"

    @property
    def varies(self) -> bool:
        """True if the weight changes during the run."""
        return not isinstance(self.weight, int | float)

    @property
    def adapts(self) -> bool:
        """True if the weight reacts to the mean of the reward."""
        return isinstance(self.weight, ThresholdWeight)

    @property
    def settled(self) -> float:
        """Weight in evaluations: the end of a schedule, or the start of a multiplier."""
        return value_range(self.weight)[-1]

    @property
    def silent(self) -> bool:
        """True if the reward is only reported."""
        return not any(value_range(self.weight))


def _check_order(shape: S, low: float | None, high: float | None) -> S:
    if low is not None and high is not None and low >= high:
        raise ValueError(f"found low: {low:g} and high: {high:g}; low must be below high")
    return shape


class ReferencesConfig(Section):
    """Reference samples of each prompt, for shapes that compare; drawn and scored when a prompt is first trained on."""

    count: int = Field(5, gt=0, description="samples of each prompt")
    snapshot: str = Field(
        "base", description="weights that draw them: base, or a snapshot that never changes (decay: 1)"
    )
