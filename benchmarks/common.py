"""Shared parts of the benchmarks: runs of `difrl train`, their curves, spreads over seeds, tables and plots.

Every run uses one CPU thread and is resumable. The measurements of a finished run are a record, a small JSON file in the
repository. A run that has a record made with the same settings is not repeated.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from difrl.config.load import load_mapping, read_config
from difrl.config.presets import PRESETS
from difrl.reporting.metrics_file import read_metrics
from difrl.runtime.paths import recipes
from difrl.training.cost.estimate import estimate

CLEAR = 2
"""A change counts if it is larger than this many standard errors."""
COLORS = ("#1f6fb2", "#c8553d", "#3a8f5c", "#8a5fb0", "#d19a1c", "#5b6b7a", "#c45a9c", "#2aa5a5")
REWARD, WATCHED, DIVERSITY = "eval/reward/geneval", "eval/watch/judge", "eval/diversity/pixels"


@dataclass(frozen=True)
class Job:
    """A run of a recipe. `name` is the name of its record; name and settings together are the name of its run folder."""

    recipe: str
    name: str
    overrides: tuple[str, ...] = ()

    @property
    def settings(self) -> str:
        """Fingerprint of the recipe, of its preset and of the overrides."""
        recipe = load_mapping(recipes()[self.recipe])
        everything = [recipe, dict(PRESETS[recipe["algorithm"]].settings), self.overrides]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Curve:
    """Evaluations of one run; every array [evaluations]."""

    nfe: np.ndarray
    seconds: np.ndarray
    reward: np.ndarray
    stderr: np.ndarray
    watched: np.ndarray
    diversity: np.ndarray
    divergence: float
    """Mean squared difference of the outputs of the final and the pretrained model, along evaluation samples."""

    @classmethod
    def of_run(cls, run: Path) -> Self:
        """Read the evaluations of a run, with the training time spent before each."""
        points, seconds = [], 0.0
        for row in read_metrics(run):
            seconds += sum(v for k, v in row.items() if k.startswith("time/"))
            if REWARD in row:
                keys = (REWARD, f"{REWARD}/stderr", WATCHED, DIVERSITY)
                points.append((row["nfe"], seconds, *(row[key] for key in keys)))
        sweep = json.loads((run / "rlg.json").read_text())
        return cls(*np.array(points).T, divergence=sweep["divergence/base"][sweep["weights"].index(1.0)])


class Graded(Protocol):
    """A curve of the trained reward with its standard errors; every array [evaluations]."""

    @property
    def reward(self) -> np.ndarray: ...

    @property
    def stderr(self) -> np.ndarray: ...


class Measured(Protocol):
    """Measurements of a run: a frozen dataclass of numbers and arrays."""

    @classmethod
    def of_run(cls, run: Path) -> Self:
        """Read the folder of a finished run."""


M = TypeVar("M", bound=Measured)


@dataclass(frozen=True)
class Bench(Generic[M]):
    """Folders of runs and records, and the kind of measurements that is read from them."""

    runs: Path
    records: Path
    kind: type[M] = Curve

    def record(self, job: Job) -> Path:
        """Return the path of a record."""
        return self.records / f"{job.name}.json"

    def known(self, job: Job) -> bool:
        """Return whether there is a record made with the settings of the job."""
        record = self.record(job)
        return record.exists() and json.loads(record.read_text())["settings"] == job.settings

    def curve(self, job: Job) -> M:
        """Return the measurements of a run from its record, or else train it and write the record."""
        record = self.record(job)
        if self.known(job):
            return read_record(record, self.kind)
        place = self.runs / f"{job.name}-{job.settings}"
        command = [sys.executable, "-m", "difrl", "train", str(recipes()[job.recipe]), "--resume"]
        command += [f"output_dir={place}", "train.threads=1", *job.overrides]
        if not (place / "summary.json").exists():
            subprocess.run(command, check=True, stdout=sys.stderr)
        return write_record(record, job, self.kind.of_run(place))

    def curves(self, jobs: Sequence[Job], at_once: int) -> list[M]:
        """Return the measurements of all jobs, training `at_once` of them at a time."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(self.curve, jobs))

    def by_recipe(self, jobs: Sequence[Job], at_once: int) -> dict[str, list[M]]:
        """Return the measurements of all jobs by recipe, in the order of the jobs."""
        found: dict[str, list[M]] = {}
        for job, curve in zip(jobs, self.curves(jobs, at_once), strict=True):
            found.setdefault(job.recipe, []).append(curve)
        return found


def write_record(record: Path, job: Job, curve: M) -> M:
    """Write the record of a run and return its measurements."""
    columns = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(curve).items()}
    record.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"recipe": job.recipe, "overrides": job.overrides, "settings": job.settings, **columns}, indent=1)
    record.write_text(text + "\n")
    return curve


def read_record(record: Path, kind: type[M]) -> M:
    """Read a record, the inverse of `write_record`."""
    found = json.loads(record.read_text())
    columns = {field.name: found[field.name] for field in fields(kind)}
    return kind(**{k: np.array(v) if isinstance(v, list) else v for k, v in columns.items()})


def at_budget(recipe: str, budget: int, evaluations: int) -> tuple[str, ...]:
    """Return overrides with which a recipe spends a budget of denoiser evaluations and has this number of evaluations."""
    path = recipes()[recipe]
    steps = max(1, round(budget / estimate(read_config(path)).evaluations.step))
    return f"train.steps={steps}", f"eval.every={math.ceil(steps / evaluations)}"


def reach(curve: Curve, level: float, axis: np.ndarray) -> float:
    """Return the position on an axis at which the reward first reaches a level, interpolated between evaluations, or inf."""
    above = np.flatnonzero(curve.reward >= level)
    if len(above) == 0:
        return math.inf
    i = above[0]
    if i == 0:
        return float(axis[0])
    part = (level - curve.reward[i - 1]) / (curve.reward[i] - curve.reward[i - 1])
    return float(axis[i - 1] + part * (axis[i] - axis[i - 1]))


def gain(curves: Sequence[Graded]) -> tuple[float, float]:
    """Return the gain of the reward from the first evaluation to the last, mean over seeds, and its standard error.

    The error assumes independent samples. It is rather large, because both evaluations share prompts and noise.
    """
    errors = [math.hypot(c.stderr[0], c.stderr[-1]) for c in curves]
    return float(np.mean([c.reward[-1] - c.reward[0] for c in curves])), math.hypot(*errors) / len(errors)


def verdict(curves: Sequence[Graded]) -> str:
    """Return the sign of the gain in words."""
    change, error = gain(curves)
    if change > CLEAR * error:
        return "improves"
    return "gets worse" if change < -CLEAR * error else "not improving in the budget"


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Return the mean, and the lowest and highest of the seeds. `never` counts the seeds whose value is infinite."""
    reached = [v for v in values if math.isfinite(v)]
    if not reached:
        return "never"
    text = form.format(float(np.mean(reached)))
    if len(values) > 1:
        text += f" ({form.format(min(reached))} to {form.format(max(reached))})"
    return text if len(reached) == len(values) else f"{text}, {len(values) - len(reached)} of {len(values)} never"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


Axis = Callable[[Curve], np.ndarray]


def mean_line(runs: Sequence[Curve], x: Axis, y: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over seeds of y against x, up to the shortest run."""
    grid = np.linspace(0, min(x(c)[-1] for c in runs), 100)
    return grid, np.mean([np.interp(grid, x(c), y(c)) for c in runs], axis=0)


def plot_curves(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Plot the reward against denoiser evaluations and against minutes: a thin line a seed, a thick line for their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for (label, runs), color in zip(curves.items(), COLORS, strict=False):
        for ax, x in zip(axes, (lambda c: c.nfe / 1e3, lambda c: c.seconds / 60), strict=True):
            for c in runs:
                ax.plot(x(c), c.reward, color=color, alpha=0.25, linewidth=0.8)
            ax.plot(*mean_line(runs, x, lambda c: c.reward), color=color, linewidth=2.2, label=label)
    axes[0].set(xlabel="denoiser evaluations (thousands)", ylabel="accuracy on evaluation prompts")
    axes[1].set(xlabel="minutes of training, one CPU thread")
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize="small")
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Write a figure, and make its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)
