"""AWM against Flow-GRPO: the same model, reward, prompts and seeds; reward against evaluations and against time.

    python benchmarks/quickstart.py --seeds 0 1 2          trains what is missing, then writes table and plot

Runs are resumable: a run that is finished is only read. Every run uses one CPU thread, `--jobs` of them at a time, so that
times compare between the methods of one invocation (and with nothing else).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from difrl.metrics import read_metrics
from difrl.paths import recipes

METHODS = {"quickstart": "AWM", "flow_grpo": "Flow-GRPO"}
COLORS = {"quickstart": "#1f6fb2", "flow_grpo": "#c8553d"}
REWARD, WATCHED = "eval/reward/geneval", "eval/watch/judge"


@dataclass(frozen=True)
class Curve:
    """Evaluations of one run; every array [evaluations]."""

    nfe: np.ndarray
    seconds: np.ndarray
    reward: np.ndarray
    watched: np.ndarray


def train(method: str, seed: int, folder: Path, overrides: Sequence[str]) -> Curve:
    """Trains one run to its end, or reads it where it is finished."""
    place = folder / f"{method}-{seed}"
    if not (place / "summary.json").exists():
        command = [sys.executable, "-m", "difrl", "train", str(recipes()[method]), f"seed={seed}", "--resume"]
        command += [f"output_dir={place}", "train.threads=1", *overrides]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return read_curve(place)


def read_curve(run: Path) -> Curve:
    """The evaluations of a finished run, with the training time spent before each."""
    points, seconds = [], 0.0
    for row in read_metrics(run):
        seconds += sum(v for k, v in row.items() if k.startswith("time/"))
        if REWARD in row:
            points.append((row["nfe"], seconds, row[REWARD], row[WATCHED]))
    return Curve(*np.array(points).T)


def reach(curve: Curve, level: float, axis: np.ndarray) -> float:
    """Where along an axis the reward first reaches a level, interpolated between evaluations; inf if it never does."""
    above = np.flatnonzero(curve.reward >= level)
    if len(above) == 0:
        return math.inf
    i = above[0]
    if i == 0:
        return float(axis[0])
    part = (level - curve.reward[i - 1]) / (curve.reward[i] - curve.reward[i - 1])
    return float(axis[i - 1] + part * (axis[i] - axis[i - 1]))


def table(curves: dict[str, list[Curve]], level: float) -> str:
    """Markdown: per method the reward at equal evaluations and the cost of a given reward; mean and range over seeds."""
    budget = min(c.nfe[-1] for runs in curves.values() for c in runs)
    lines = [
        f"| method | reward before | reward at {budget / 1e3:,.0f} k evaluations | reward at the end | judge before → end "
        f"| k evaluations to {level:.2f} | minutes to {level:.2f} |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, runs in curves.items():
        at_budget = [float(np.interp(budget, c.nfe, c.reward)) for c in runs]
        cells = (
            METHODS[method],
            spread([c.reward[0] for c in runs]),
            spread(at_budget),
            spread([c.reward[-1] for c in runs]),
            f"{spread([c.watched[0] for c in runs])} → {spread([c.watched[-1] for c in runs])}",
            spread([reach(c, level, c.nfe) / 1e3 for c in runs], "{:.0f}"),
            spread([reach(c, level, c.seconds) / 60 for c in runs], "{:.1f}"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean, and the lowest and highest of the seeds; `never` counts the seeds that did not get there."""
    reached = [v for v in values if math.isfinite(v)]
    if not reached:
        return "never"
    text = form.format(float(np.mean(reached)))
    if len(values) > 1:
        text += f" ({form.format(min(reached))} to {form.format(max(reached))})"
    return text if len(reached) == len(values) else f"{text}, {len(values) - len(reached)} of {len(values)} never"


def plot(curves: dict[str, list[Curve]], path: Path) -> None:
    """Held-out reward against evaluations and against minutes: a thin line a seed, a thick one for their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for method, runs in curves.items():
        for ax, of in zip(axes, (lambda c: c.nfe / 1e3, lambda c: c.seconds / 60), strict=True):
            for c in runs:
                ax.plot(of(c), c.reward, color=COLORS[method], alpha=0.3, linewidth=1)
            end = min(of(c)[-1] for c in runs)
            grid = np.linspace(0, end, 100)
            mean = np.mean([np.interp(grid, of(c), c.reward) for c in runs], axis=0)
            ax.plot(grid, mean, color=COLORS[method], linewidth=2.2, label=METHODS[method])
    axes[0].set(xlabel="denoiser evaluations (thousands)", ylabel="accuracy on evaluation prompts")
    axes[1].set(xlabel="minutes of training, one CPU thread")
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Trains, prints the table and writes both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--level", type=float, default=0.6, help="the reward whose cost is reported")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-quickstart"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("overrides", nargs="*", help="key.path=value for every run")
    options = parser.parse_args()
    jobs = [(method, seed) for seed in options.seeds for method in METHODS]
    with ThreadPoolExecutor(options.jobs) as pool:
        done = list(pool.map(lambda job: train(*job, options.runs, options.overrides), jobs))
    curves = {m: [c for (method, _), c in zip(jobs, done, strict=True) if method == m] for m in METHODS}
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(curves, options.level)
    (options.out / "quickstart.md").write_text(text + "\n")
    plot(curves, options.out / "quickstart.png")
    print(text)


if __name__ == "__main__":
    main()
