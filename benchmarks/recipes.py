"""Gain of every recipe for image models: each is trained by `difrl train` with the same denoiser evaluations.

    python benchmarks/recipes.py                          trains what is missing, then writes docs/recipes.md and its plot

Recipes of benchmarks/algorithms.py share its runs. All runs are resumable and use one CPU thread.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from algorithms import BUDGET, job
from common import CLEAR, COLORS, Bench, Curve, gain, markdown, plt, save, spread, verdict

from difrl.config import RunConfig
from difrl.config.load import load_mapping, read_config
from difrl.config.presets import PRESETS
from difrl.runtime.paths import assets, recipes

ELSEWHERE = {"quickstart", "awm_int8"}
"""Recipes measured in docs/measurements.md."""
PAIRS = 512
Curves = Mapping[str, Sequence[Curve]]
"""Name of the recipe -> one curve a seed."""


def shipped() -> dict[str, RunConfig]:
    """Return the recipes of image models that are shipped with difrl."""
    named = {
        name: path for name, path in recipes().items() if name not in ELSEWHERE and "algorithm" in load_mapping(path)
    }
    read = {name: read_config(path) for name, path in named.items()}
    return {name: run for name, run in read.items() if run.model.path in assets() and run.likelihood.kind != "tokens"}


def make_pairs(runs: Mapping[str, RunConfig]) -> None:
    """Make the preference files that recipes learn from, by the command in their heads, unless they exist."""
    files = {Path(run.data.train) for run in runs.values() if run.data.rows == "pairs"}
    for file in files:
        command = [sys.executable, "-m", "difrl", "pairs", str(recipes()["awm"]), "train.threads=1"]
        subprocess.run([*command, "--out", str(file.parent), "--count", str(PAIRS)], check=True, stdout=sys.stderr)


def table(curves: Curves, runs: Mapping[str, RunConfig]) -> str:
    """Return a table of one row a recipe, the largest gain first."""
    header = (
        "recipe",
        "likelihood × objective",
        "model",
        "arXiv",
        "reward before → after",
        "gain",
        "judge (watched) before → after",
        "minutes",
        "",
    )
    rows = []
    for name in sorted(curves, key=lambda name: -gain(curves[name])[0]):
        found, run = curves[name], runs[name]
        change, error = gain(found)
        rows.append(
            (
                f"`{name}`",
                f"{run.likelihood.kind} × {run.objective.kind.replace('_', ' ')}",
                run.model.path,
                PRESETS[str(run.algorithm)].source,
                f"{spread([c.reward[0] for c in found])} → {spread([c.reward[-1] for c in found])}",
                f"{change:+.3f} ± {error:.3f}",
                f"{spread([c.watched[0] for c in found])} → {spread([c.watched[-1] for c in found])}",
                f"{np.mean([c.seconds[-1] for c in found]) / 60:.1f}",
                verdict(found),
            )
        )
    return markdown(header, rows)


def plot(curves: Curves, runs: Mapping[str, RunConfig], path: Path) -> None:
    """Plot reward and judge of each recipe against evaluations, in small multiples."""
    columns = 4
    lines = math.ceil(len(curves) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(11, 2.3 * lines), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for ax, (name, found) in zip(axes.flat, curves.items(), strict=False):
        for number, c in enumerate(found):
            labels = ("reward", "judge (watched)") if number == 0 else (None, None)
            ax.errorbar(c.nfe / 1e3, c.reward, c.stderr, color=COLORS[0], label=labels[0], capsize=2)
            ax.plot(c.nfe / 1e3, c.watched, color=COLORS[4], label=labels[1])
        ax.set_title(
            name if runs[name].model.path == "tiny-sd3" else f"{name} ({runs[name].model.path})", fontsize="medium"
        )
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in list(axes.flat)[len(curves) :]:
        ax.set_axis_off()
    axes.flat[0].legend(frameon=False, fontsize="small")
    figure.supxlabel("denoiser evaluations (thousands)", fontsize="medium")
    save(figure, path)


def text(curves: Curves, runs: Mapping[str, RunConfig], seeds: Sequence[int]) -> str:
    """Return docs/recipes.md."""
    lines = (
        "# Gains of the recipes",
        f"`python benchmarks/recipes.py --seeds {' '.join(map(str, seeds))}` writes this page: about "
        f"{BUDGET / 1e3:.0f} thousand denoiser evaluations per run (rollouts, updates and references; evaluation images not "
        "counted), one CPU thread. Reward: share of 512 drawings per seed that match prompts never trained on "
        "exactly, before and after, mean over seeds (lowest to highest); a gain counts beyond "
        f"{CLEAR} of its standard errors. Judge: a network that is never optimised. One seed shows whether a recipe "
        "learns but does not rank recipes: for that see [algorithms.md](benchmarks/algorithms.md). `difrl recipes` lists "
        "them with their place in the grid. The files in configs/ give the settings of their authors.",
        table(curves, runs),
        "![Reward and judge of each recipe](recipes.png)",
    )
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-algorithms"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    runs = shipped()
    make_pairs(runs)
    bench = Bench(options.runs, options.out / "benchmarks" / "records" / "recipes")
    curves = bench.by_recipe([job(name, seed) for seed in options.seeds for name in runs], options.jobs)
    plot(curves, runs, options.out / "recipes.png")
    written = text(curves, runs, options.seeds)
    (options.out / "recipes.md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
