"""The state of a training run in progress, as the displays show it: histories, speed and time left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from difrl.reporting import number_format as formats
from difrl.reporting.number_format import mean
from difrl.reporting.summary import STDERR, Change

RECENT = 20  # steps over which speed and time left are averaged: two evaluations or so at usual settings


@dataclass(frozen=True)
class RunFacts:
    """What is known before the first step. steps counts from the run's beginning, also when it is resumed.

    details: short facts for the heading, such as ("awm", "tiny-sd3", "LoRA r16"). first_step: steps already
    done, for a resumed run. reward: the metric that stands for all rewards.
    """

    name: str
    steps: int
    samples_per_step: int
    details: tuple[str, ...] = ()
    output_dir: str = ""
    first_step: int = 0
    reward: str = "reward/mean"


@dataclass(frozen=True)
class Standing:
    """One line of a display: where a measure stands, which way it goes and what it is."""

    name: str
    note: str
    values: list[float]
    direction: int = formats.LEVEL
    error: float = math.nan

    @property
    def text(self) -> str:
        if not self.values:
            return "-"
        error = f" ± {formats.number(self.error)}" if math.isfinite(self.error) else ""
        return formats.number(self.values[-1]) + error


@dataclass
class Progress:
    """Histories by metric key; NaN stands where a step did not report a metric that others did."""

    facts: RunFacts
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    nfe: float = math.nan
    history: dict[str, list[float]] = field(default_factory=dict)
    evaluations: dict[str, list[float]] = field(default_factory=dict)
    evaluated_at: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.step = self.facts.first_step
        self.started = self._mark = self.clock()
        self._intervals: list[float] = []

    def record(self, metrics: Mapping[str, float]) -> None:
        self.step = int(metrics.get("step", self.step + 1))
        self.nfe = float(metrics.get("nfe", self.nfe))
        for key, value in metrics.items():
            self.history.setdefault(key, []).append(float(value))
        now = self.clock()
        self._intervals.append(now - self._mark)
        self._mark = now

    def record_evaluation(self, metrics: Mapping[str, float]) -> None:
        self.evaluated_at.append(int(metrics.get("step", self.step)))
        for key, value in metrics.items():
            if key.startswith("eval/"):
                self.evaluations.setdefault(key, []).append(float(value))
        if not self._intervals:  # the evaluation before the first step is no part of a step's time
            self._mark = self.clock()

    def latest(self, key: str) -> float:
        return next(reversed(self.history.get(key, [])), math.nan)

    def standings(self) -> list[Standing]:
        """The reward on evaluation prompts, then every watched one; the direction is the change since the first."""
        names = [key for key in self.evaluations if key.startswith("eval/watch/")]
        watched = [key for key in names if key.count("/") == 2]  # no standard errors, no members of an ensemble
        found, trained = [], f"eval/{self.facts.reward}"
        for key in [trained, *watched]:
            values = self.evaluations.get(key, [])
            if not values:
                continue
            errors = self.evaluations.get(key + STDERR, [math.nan])
            change = Change(key, "", values[0], values[-1], errors[0], errors[-1])
            evaluated = key == trained
            note = formats.signed(change.difference) if values[1:] else ""
            if not evaluated:
                note = f"watched, {note}" if note else "watched"
            elif note:
                note += f" since step {self.evaluated_at[0]}"
            name = "evaluation" if evaluated else key.removeprefix("eval/watch/")
            found.append(Standing(name, note, values, change.direction if values[1:] else 0, errors[-1]))
        return found

    def rewards(self) -> tuple[str, list[float]]:
        """What the reward is called, and what it was in each step."""
        name = self.facts.reward.removesuffix("/mean").replace("/", " ")
        return name, self.history.get(self.facts.reward, [])

    def anchors(self) -> list[str]:
        return [key for key in self.history if key.startswith("kl/")]

    def stage_seconds(self) -> dict[str, float]:
        """Mean seconds a step of each stage (rollout, score, update) over recent steps."""
        keys = [key for key in self.history if key.startswith("time/")]
        return {key.removeprefix("time/"): mean(self.history[key][-RECENT:]) for key in keys}

    def step_seconds(self) -> float:
        """Wall time a step, evaluations and checkpoints included, over recent steps."""
        return mean(self._intervals[-RECENT:])

    def samples_per_second(self) -> float:
        """Samples a step over the time of its stages, without evaluations; over wall time if unknown."""
        working = sum(self.stage_seconds().values()) or self.step_seconds()
        return self.facts.samples_per_step / working if working > 0 else math.nan

    def seconds_left(self) -> float:
        return max(0, self.facts.steps - self.step) * self.step_seconds()

    def elapsed(self) -> float:
        return self.clock() - self.started


def started(progress: Progress | None) -> Progress:
    if progress is None:
        raise RuntimeError("the display was used before start(facts) was called")
    return progress
