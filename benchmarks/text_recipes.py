"""Gain of every recipe for language models: each is trained by `difrl train` with the same number of generated tokens.

    python benchmarks/text_recipes.py                     trains what is missing, then writes docs/text_recipes.md and its plot

The tokens that a step of a recipe draws are measured in its first steps and kept as a record. A recipe that draws none, because
it learns from a file, trains for its own number of steps. Runs are resumable and use one CPU thread each.
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from common import CLEAR, COLORS, Bench, Job, gain, markdown, plt, save, spread, verdict

from difrl.config import RunConfig
from difrl.config.load import load_mapping, read_config
from difrl.config.presets import PRESETS
from difrl.reporting.metrics_file import read_metrics
from difrl.runtime.paths import recipes

BUDGET = 100_000
"""Number of tokens that a run draws."""
EVALUATIONS = 5
PROBED = 3
"""Number of steps in which the tokens of a step are measured."""
REWARD = "eval/reward/math"
ELSEWHERE = {"text/quickstart"}
"""Recipes measured in docs/measurements.md."""
TRIED = {
    "text/adpo": 2,
    "text/dapo": 2,
    "text/dpo": 5,
    "text/f_dpo": 4,
    "text/g_opd": 3,
    "text/ipo": 2,
    "text/rdpo": 2,
}
"""Number of settings that were tried until a recipe had those it is shipped with; one for all others."""
FIRST = "#   difrl "
"""Start of a line in the head of a recipe: a command that makes the pairs of texts or the teacher that it reads."""
RESUMING: Mapping[str, Sequence[str]] = {"pairs": (), "train": ("--resume",)}
"""Options with which each command continues where it stopped."""


@dataclass(frozen=True)
class TextCurve:
    """Evaluations of one run; every array [evaluations]."""

    step: np.ndarray
    tokens: np.ndarray
    """Number of tokens drawn so far."""
    seconds: np.ndarray
    reward: np.ndarray
    stderr: np.ndarray

    @classmethod
    def of_run(cls, run: Path) -> Self:
        """Read the evaluations of a run, with the training time spent before each."""
        points, seconds = [], 0.0
        for row in read_metrics(run):
            seconds += sum(v for k, v in row.items() if k.startswith("time/"))
            if REWARD in row:
                points.append((row["step"], row["nfe"], seconds, row[REWARD], row[f"{REWARD}/stderr"]))
        return cls(*np.array(points).T)


Curves = Mapping[str, Sequence[TextCurve]]
"""Name of the recipe -> one curve a seed."""


@dataclass(frozen=True)
class Pace:
    """Number of tokens that a step of a recipe draws."""

    tokens: float

    @classmethod
    def of_run(cls, run: Path) -> Self:
        """Read a run of a few steps."""
        rows = read_metrics(run)
        return cls(max(row["nfe"] for row in rows) / max(row["step"] for row in rows))


def shipped() -> dict[str, RunConfig]:
    """Return the recipes of language models that are shipped with difrl."""
    named = {
        name: path for name, path in recipes().items() if name not in ELSEWHERE and "algorithm" in load_mapping(path)
    }
    read = {name: read_config(path) for name, path in named.items()}
    return {name: run for name, run in read.items() if run.likelihood.kind == "tokens"}


def prepare(names: Iterable[str]) -> None:
    """Make the files that these recipes read, by the commands in their heads, unless they exist."""
    lines = [line for name in names for line in recipes()[name].read_text(encoding="utf-8").splitlines()]
    for line in dict.fromkeys(line for line in lines if line.startswith(FIRST)):
        verb, *words = shlex.split(line.removeprefix(FIRST))
        command = [sys.executable, "-m", "difrl", verb, *words, *RESUMING[verb], "train.threads=1"]
        subprocess.run(command, check=True, stdout=sys.stderr)


def probe(name: str, seed: int, more: Sequence[str]) -> Job:
    """Return the run that measures the pace of a recipe."""
    few = (f"train.steps={PROBED}", "eval.every=0", "eval.rlg=[]", "checkpoint.every=0")
    return Job(name, f"{name}-pace", (f"seed={seed}", *few, *more))


def job(name: str, run: RunConfig, pace: Pace, seed: int, budget: int, more: Sequence[str]) -> Job:
    """Return the run of a recipe that spends the budget."""
    steps = run.train.steps if pace.tokens == 0 else max(1, round(budget / pace.tokens))
    length = (f"train.steps={steps}", f"eval.every={math.ceil(steps / EVALUATIONS)}")
    return Job(name, f"{name}-{seed}", (f"seed={seed}", *length, *more))


def table(curves: Curves, runs: Mapping[str, RunConfig]) -> str:
    """Return a table of one row a recipe, the largest gain first."""
    header = (
        "recipe",
        "objective",
        "anchor",
        "arXiv",
        "right before → after",
        "gain",
        "tokens",
        "minutes",
        "tried",
        "",
    )
    rows = []
    for name in sorted(curves, key=lambda name: -gain(curves[name])[0]):
        found, run = curves[name], runs[name]
        change, error = gain(found)
        tokens = np.mean([c.tokens[-1] for c in found])
        rows.append(
            (
                f"`{name}`",
                run.objective.kind.replace("_", " "),
                ", ".join(f"{a.label} ({a.divergence.replace('_', ' ')})" for a in run.anchors) or "–",
                PRESETS[str(run.algorithm)].source,
                f"{np.mean([c.reward[0] for c in found]):.3f} → {spread([c.reward[-1] for c in found])}",
                f"{change:+.3f} ± {error:.3f}",
                f"{tokens / 1e3:.0f} k" if tokens else "– (pairs)",
                f"{np.mean([c.seconds[-1] for c in found]) / 60:.1f}",
                str(TRIED.get(name, 1)),
                verdict(found),
            )
        )
    return markdown(header, rows)


def learns_from(run: RunConfig) -> str:
    """Return the source of the learning signal of a recipe."""
    if run.data.rows == "pairs":
        return "pairs of a file"
    return "rewards of its own texts" if any(reward.weight for reward in run.rewards) else "a teacher"


def plot(curves: Curves, runs: Mapping[str, RunConfig], path: Path) -> None:
    """Plot the share of right answers during each run, in small multiples, the highest final share first."""
    columns = 5
    lines = math.ceil(len(curves) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(11, 1.9 * lines), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    colors: dict[str, str] = {}
    ends = {name: float(np.mean([c.reward[-1] for c in found])) for name, found in curves.items()}
    for ax, name in zip(axes.flat, sorted(curves, key=lambda name: -ends[name]), strict=False):
        signal = learns_from(runs[name])
        color = colors.setdefault(signal, COLORS[len(colors)])
        ax.axhline(np.mean([c.reward[0] for c in curves[name]]), color="#999999", linewidth=0.8, linestyle="--")
        for c in curves[name]:
            ax.errorbar(100 * c.step / c.step[-1], c.reward, c.stderr, color=color, alpha=0.6, capsize=2)
        ax.set_title(f"{name.removeprefix('text/')}  {ends[name]:.2f}", fontsize="medium")
        ax.set_xticks([0, 50, 100])
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in list(axes.flat)[len(curves) :]:
        ax.set_axis_off()
    handles = [plt.Line2D([], [], color=color) for color in colors.values()]
    names = [f"learns from {signal}" for signal in colors]
    figure.legend(handles, names, frameon=False, loc="outside upper center", ncols=len(colors))
    figure.supxlabel("% of the run", fontsize="medium")
    figure.supylabel("share of right answers", fontsize="medium")
    save(figure, path)


def text(curves: Curves, runs: Mapping[str, RunConfig], budget: int, seeds: Sequence[int]) -> str:
    """Return docs/text_recipes.md."""
    samples = min(run.eval.final_images or run.eval.images for run in runs.values())
    lines = (
        "# Gains of the recipes of language models",
        f"`python benchmarks/text_recipes.py --seeds {' '.join(map(str, seeds))}` writes this page: about "
        f"{budget / 1e3:.0f} thousand tokens drawn for training per run, one CPU thread. Mean over seeds, in brackets the lowest "
        "and highest. `difrl recipes` lists all with their place in the grid. The files in configs/text give the settings "
        "of their authors.",
        table(curves, runs),
        f"- **right**: share of {samples} completions per seed with the right answer, sampled as in training, of problems "
        f"never trained on. A gain counts beyond {CLEAR} of its standard errors, which are those of the {samples} samples.\n"
        "- **tokens**: tokens drawn for training, including those that DAPO drops, but not those of evaluations, references and "
        "updates. Recipes that read pairs draw none and train for their own number of steps.\n"
        "- **tried**: number of settings measured with seed 0 on the same problems. Several tries bias the figure of a recipe "
        "upwards a little.\n"
        "- **minutes**: minutes of training, on a machine shared with other jobs.\n"
        "- Pairs and the teacher of `g_opd` and `vopd` (GRPO after 60 steps) are made once, by the commands in the heads of the "
        "recipes, and are the same for all seeds.",
        table(curves, runs),
        "![Right answers in the course of each run](text_recipes.png)",
    )
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--budget", type=int, default=BUDGET, help="tokens a run")
    parser.add_argument("--only", nargs="*", default=None, help="names of recipes (default: all)")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of every recipe, key=value")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-text"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    runs = {name: run for name, run in shipped().items() if options.only is None or name in options.only}
    records = options.out / "benchmarks" / "records"
    stretches, bench = Bench(options.runs, records, Pace), Bench(options.runs, records, TextCurve)
    probes = [probe(name, options.seeds[0], options.set) for name in runs]
    prepare(probe.recipe for probe in probes if not stretches.known(probe))
    paces = stretches.by_recipe(probes, options.jobs)
    jobs = [
        job(name, run, *paces[name], seed, options.budget, options.set)
        for seed in options.seeds
        for name, run in runs.items()
    ]
    prepare(job.recipe for job in jobs if not bench.known(job))
    curves = bench.by_recipe(jobs, options.jobs)
    plot(curves, runs, options.out / "text_recipes.png")
    written = text(curves, runs, options.budget, options.seeds)
    (options.out / "text_recipes.md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
