"""History of a run in progress, as both displays show it: metrics, speed and time left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from difrl.reporting import number_format as formats
from difrl.reporting.number_format import mean_of_finite
from difrl.reporting.summary import STDERR, Change

RECENT = 20  # steps over which speed and time left are averaged: about two evaluations at usual settings


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run that are known before its first step."""

    name: str
    steps: int
    """Number of steps from the run's beginning, also if the run is resumed."""
    samples_per_step: int
    details: tuple[str, ...] = ()
    """Short facts for the heading, such as ("awm", "tiny-sd3", "LoRA r16")."""
    output_dir: str = ""
    first_step: int = 0
    """Number of steps already done, for a resumed run."""
    reward: str = "reward/mean"
    """The metric that represents all rewards."""


@dataclass(frozen=True)
class HistoryRow:
    """One line of a display: the history of a metric, the direction of its change and a note."""

    name: str
    values: list[float]
    note: str = ""
    direction: int | None = None
    """None without a value."""
    error: float = math.nan

    @property
    def text(self) -> str:
        return formats.number(self.values[-1]) + formats.plus_minus(self.error) if self.values else "-"


@dataclass
class History:
    """Values by metric key, of steps and of evaluations."""

    facts: RunFacts
    clock: Callable[[], float] = time.monotonic
    steps: dict[str, list[float]] = field(default_factory=dict)
    evaluations: dict[str, list[float]] = field(default_factory=dict)
    evaluated_at: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.step = self.facts.first_step
        self._last_time = self.clock()
        self._intervals: list[float] = []

    def record(self, metrics: Mapping[str, float]) -> None:
        self.step = int(metrics.get("step", self.step + 1))
        for key, value in metrics.items():
            self.steps.setdefault(key, []).append(float(value))
        now = self.clock()
        self._intervals.append(now - self._last_time)
        self._last_time = now

    def record_evaluation(self, metrics: Mapping[str, float]) -> None:
        self.evaluated_at.append(int(metrics.get("step", self.step)))
        for key, value in metrics.items():
            if key.startswith("eval/"):
                self.evaluations.setdefault(key, []).append(float(value))
        if not self._intervals:  # the evaluation before the first step is not part of a step's time
            self._last_time = self.clock()

    def reward(self) -> HistoryRow:
        """Return the reward on training prompts. Its direction is the trend of recent steps."""
        name = self.facts.reward.removesuffix("/mean").replace("/", " ")
        values = self.steps.get(self.facts.reward, [])
        return HistoryRow(name, values, "training prompts", formats.trend(values) if values else None)

    def evaluated(self) -> list[HistoryRow]:
        """Return the reward on evaluation prompts, then every watched one. Directions are changes since the first evaluation."""
        rows, trained = [], f"eval/{self.facts.reward}"
        # Three parts: neither standard errors nor the members of an ensemble.
        watched = [key for key in self.evaluations if key.startswith("eval/watch/") and key.count("/") == 2]
        for key in [key for key in (trained, *watched) if key in self.evaluations]:
            values, errors = self.evaluations[key], self.evaluations.get(key + STDERR, [math.nan])
            change = Change(key, "", values[0], values[-1], errors[0], errors[-1])
            notes = [] if key == trained else ["watched"]
            if len(values) > 1:
                since = f" since step {self.evaluated_at[0]}" if key == trained else ""
                notes.append(formats.signed(change.difference) + since)
            name = "evaluation" if key == trained else key.removeprefix("eval/watch/")
            rows.append(
                HistoryRow(name, values, ", ".join(notes), change.direction if len(values) > 1 else 0, errors[-1])
            )
        return rows

    def anchors(self) -> list[HistoryRow]:
        """Return the divergence from every anchor."""
        found = {key: values for key, values in self.steps.items() if key.startswith("kl/")}
        return [
            HistoryRow(f"KL to {key.removeprefix('kl/')}", values, "", formats.trend(values))
            for key, values in found.items()
        ]

    def stage_seconds(self) -> dict[str, float]:
        """Return the mean seconds of each stage (rollout, score, update) over recent steps."""
        stages = {key: values for key, values in self.steps.items() if key.startswith("time/")}
        return {key.removeprefix("time/"): mean_of_finite(values[-RECENT:]) for key, values in stages.items()}

    def step_seconds(self) -> float:
        """Return the mean wall time of recent steps, evaluations and checkpoints included."""
        return mean_of_finite(self._intervals[-RECENT:])

    def samples_per_second(self) -> float:
        """Return the samples of a step over the time of its stages, or over its wall time if no stage is timed."""
        working = sum(self.stage_seconds().values()) or self.step_seconds()
        return self.facts.samples_per_step / working if working > 0 else math.nan

    def seconds_left(self) -> float:
        return max(0, self.facts.steps - self.step) * self.step_seconds()


def started(history: History | None) -> History:
    """Return the history of a display that was started. Raise RuntimeError for another."""
    if history is None:
        raise RuntimeError("the display was used before start(facts) was called")
    return history
