"""What every recipe gains: each one through `difrl train` for the same denoiser evaluations, one seed.

    python benchmarks/recipes.py                          trains what is missing, then writes docs/recipes.md and its plot

The runs are those of benchmarks/algorithms.py where the recipe is the same, and like them resumable, one CPU thread each.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from algorithms import BUDGET, job
from common import COLORS, Bench, Curve, markdown, plt, save

from difrl.config import RunConfig
from difrl.paths import assets, recipes
from difrl.presets import PRESETS
from difrl.reading import load_mapping, read_config

ELSEWHERE = {"quickstart"}
"""Recipes measured in docs/measurements.md."""
CLEAR = 2
"""Standard errors of a gain that counts as one."""
PAIRS = 512


def shipped() -> dict[str, RunConfig]:
    """Recipes of image models that come with difrl."""
    named = {
        name: path for name, path in recipes().items() if name not in ELSEWHERE and "algorithm" in load_mapping(path)
    }
    read = {name: read_config(path) for name, path in named.items()}
    return {name: run for name, run in read.items() if run.model.path in assets() and run.likelihood.kind != "tokens"}


def make_pairs(runs: Mapping[str, RunConfig]) -> None:
    """Makes the preference files that recipes learn from, as their first lines say; one that is there is kept."""
    files = {Path(run.data.train) for run in runs.values() if run.data.rows == "pairs"}
    for file in files:
        command = [sys.executable, "-m", "difrl", "pairs", str(recipes()["awm"]), "train.threads=1"]
        subprocess.run([*command, "--out", str(file.parent), "--count", str(PAIRS)], check=True, stdout=sys.stderr)


def gain(curve: Curve) -> tuple[float, float]:
    """Of the reward from the first evaluation to the last, and its standard error.

    Both sides share prompts and noise, so the error, taken as of independent samples, is on the wide side.
    """
    return float(curve.reward[-1] - curve.reward[0]), math.hypot(curve.stderr[0], curve.stderr[-1])


def verdict(curve: Curve) -> str:
    """What the gain says."""
    change, error = gain(curve)
    if change > CLEAR * error:
        return "improves"
    return "gets worse" if change < -CLEAR * error else "not improving in the budget"


def table(curves: Mapping[str, Curve], runs: Mapping[str, RunConfig]) -> str:
    """Markdown: a row a recipe, the largest gain first."""
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
        curve, run = curves[name], runs[name]
        change, error = gain(curve)
        rows.append(
            (
                f"`{name}`",
                f"{run.likelihood.kind} × {run.objective.kind.replace('_', ' ')}",
                run.model.path,
                PRESETS[str(run.algorithm)].source,
                f"{curve.reward[0]:.3f} → {curve.reward[-1]:.3f}",
                f"{change:+.3f} ± {error:.3f}",
                f"{curve.watched[0]:.3f} → {curve.watched[-1]:.3f}",
                f"{curve.seconds[-1] / 60:.1f}",
                verdict(curve),
            )
        )
    return markdown(header, rows)


def plot(curves: Mapping[str, Curve], runs: Mapping[str, RunConfig], path: Path) -> None:
    """Small multiples: reward and judge of each recipe against evaluations."""
    columns = 4
    lines = math.ceil(len(curves) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(11, 2.3 * lines), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for ax, (name, curve) in zip(axes.flat, curves.items(), strict=False):
        ax.errorbar(curve.nfe / 1e3, curve.reward, curve.stderr, color=COLORS[0], label="reward", capsize=2)
        ax.plot(curve.nfe / 1e3, curve.watched, color=COLORS[4], label="judge (watched)")
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


def text(curves: Mapping[str, Curve], runs: Mapping[str, RunConfig]) -> str:
    """docs/recipes.md."""
    lines = (
        "# Recipes, and what each gains",
        f"`python benchmarks/recipes.py`, made anew by that command: seed 0, about {BUDGET / 1e3:.0f} thousand denoiser "
        "evaluations a run (rollouts, updates and references; evaluation images not counted), one CPU thread. Reward: share of "
        "512 drawings for prompts never trained on that show exactly what was asked, before and after; the gain with its "
        f"standard error counts as one beyond {CLEAR} of them. Judge: a network that is never optimised. One seed says whether "
        "a recipe learns; it does not rank recipes: for that see [algorithms.md](benchmarks/algorithms.md). `difrl recipes` "
        "lists them with their whole place in the grid, the files in configs/ say what the authors used where.",
        table(curves, runs),
        "![Reward and judge of each recipe](recipes.png)",
    )
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Trains, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-algorithms"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    runs = shipped()
    make_pairs(runs)
    bench = Bench(options.runs, options.out / "benchmarks" / "records" / "recipes")
    curves = dict(zip(runs, bench.curves([job(name, options.seed) for name in runs], options.jobs), strict=True))
    plot(curves, runs, options.out / "recipes.png")
    written = text(curves, runs)
    (options.out / "recipes.md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
