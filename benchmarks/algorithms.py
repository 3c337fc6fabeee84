"""Published algorithms side by side: the same model, reward, prompts and seeds, at equal denoiser evaluations.

    python benchmarks/algorithms.py --seeds 0 1 2 --jobs 2      trains what is missing, then writes table and plot

Each method is its recipe in configs/ with the number of steps that spends the budget. Runs are resumable, and a run with a
record is not repeated. Every run uses one CPU thread, `--jobs` of them at a time, so times are comparable between the methods
of one invocation only.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from common import COLORS, Bench, Curve, Job, at_budget, markdown, mean_line, plt, reach, save, spread

from difrl.config.load import read_config
from difrl.runtime.paths import recipes

METHODS = {
    "awm": "AWM",
    "crd": "CRD",
    "nft": "DiffusionNFT",
    "grpo_guard": "GRPO-Guard",
    "flow_grpo": "Flow-GRPO",
    "dance_grpo": "DanceGRPO",
    "cps": "Flow-CPS",
}
BUDGET, EVALUATIONS = 60_000, 6
SIZES = ("eval.images=256", "eval.final_images=512", "eval.rlg=[1.0]", "checkpoint.every=5")
LEVELS = (0.55, 0.6, 0.65, 0.7)
FAST, SLOW = "AWM", "Flow-GRPO"
Runs = Mapping[str, Sequence[Curve]]


def job(recipe: str, seed: int) -> Job:
    """Return the run of a recipe at the budget of the benchmark, shared with benchmarks/recipes.py."""
    overrides = (f"seed={seed}", *at_budget(recipe, BUDGET, EVALUATIONS), *SIZES)
    return Job(recipe, f"{recipe}-{seed}", overrides)


def table(runs: Runs) -> str:
    """Return a table of the results of each method at the budget; mean and range over seeds."""
    header = (
        "method",
        "likelihood × objective",
        "updates a step",
        "reward",
        "judge (watched)",
        "diversity",
        "divergence from base",
        "minutes",
    )
    pretrained = next(iter(runs.values()))  # all methods start from the same evaluation of each seed
    rows = [("*before*", "", "", *measured(pretrained, 0), "0", "0")]
    for recipe, method in METHODS.items():
        found, config = runs[method], read_config(recipes()[recipe])
        grid = f"{config.likelihood.kind} × {config.objective.kind.replace('_', ' ')}"
        minutes = spread([c.seconds[-1] / 60 for c in found], "{:.1f}")
        drift = spread([c.divergence for c in found], "{:.4f}")
        rows.append((method, grid, str(config.train.updates_per_step), *measured(found, -1), drift, minutes))
    return markdown(header, rows)


def measured(found: Sequence[Curve], which: int) -> tuple[str, ...]:
    """Return reward, judge and diversity at one evaluation."""
    columns = ([c.reward for c in found], [c.watched for c in found], [c.diversity for c in found])
    return tuple(spread([values[which] for values in column]) for column in columns)


def costs(runs: Runs, name: str, unit: float, form: str) -> str:
    """Return a table of the cost at which each method reaches each level of the reward."""
    rows = []
    for method, found in runs.items():
        axes = [getattr(c, name) / unit for c in found]
        reached = [[reach(c, level, axis) for c, axis in zip(found, axes, strict=True)] for level in LEVELS]
        rows.append((method, *(spread(values, form) for values in reached)))
    return markdown(("method", *(f"to {level:g}" for level in LEVELS)), rows)


def ratios(runs: Runs) -> str:
    """Return the evaluations of the slow method in units of those of the fast one, for each level, over seeds."""
    lines = []
    for level in LEVELS:
        pairs = [tuple(reach(c, level, c.nfe) for c in pair) for pair in zip(runs[FAST], runs[SLOW], strict=True)]
        both = [slow / fast for fast, slow in pairs if math.isfinite(slow) and 0 < fast < math.inf]
        late = [runs[SLOW][0].nfe[-1] / fast for fast, slow in pairs if math.isinf(slow) and 0 < fast < math.inf]
        found = [f"{spread(both, '{:.1f}')} times"] if both else []
        if late:
            seeds = f"{len(late)} of {len(pairs)} seeds"
            found.append(f"over {min(late):.1f} times in {seeds}, where {SLOW} never reached it")
        lines.append(f"* to {level:g}: {', and '.join(found) or 'not reached'}")
    return "\n".join(lines)


def plot(runs: Runs, path: Path) -> None:
    """Plot the reward against evaluations and minutes, and the watched reward against divergence."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for (method, found), color in zip(runs.items(), COLORS, strict=False):
        for ax, x in zip(axes, (lambda c: c.nfe / 1e3, lambda c: c.seconds / 60), strict=False):
            for c in found:
                ax.plot(x(c), c.reward, color=color, alpha=0.2, linewidth=0.8)
            ax.plot(*mean_line(found, x, lambda c: c.reward), color=color, linewidth=2.2, label=method)
        axes[2].scatter([c.divergence for c in found], [c.watched[-1] for c in found], color=color, s=26, label=method)
    start = float(np.mean([c.watched[0] for found in runs.values() for c in found]))
    axes[2].axhline(start, color="#999999", linewidth=0.8, linestyle="--")
    axes[2].annotate("before", (1, start), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#777777")
    axes[0].set(xlabel="denoiser evaluations (thousands)", ylabel="accuracy on evaluation prompts")
    axes[1].set(xlabel="minutes of training, one CPU thread", ylabel="accuracy on evaluation prompts")
    axes[2].set(xlabel="divergence from the pretrained model", ylabel="judge (watched), at the end")
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize="small")
    save(figure, path)


def text(runs: Runs, seeds: Sequence[int]) -> str:
    """Return docs/benchmarks/algorithms.md."""
    lines = (
        "# Algorithms at equal denoiser evaluations",
        f"`python benchmarks/algorithms.py --seeds {' '.join(map(str, seeds))}` writes this page. Model: tiny-sd3. "
        "Reward: GenEval's rules, and nothing but the requested objects in the image. Each step has 12 prompts × 12 "
        f"samples unless the recipe differs; a run has about {BUDGET / 1e3:.0f} thousand evaluations of the denoiser. One "
        "evaluation is one pass of one sample through the denoiser: in rollouts, under references and anchors, and in "
        "updates, where a forward and its backward pass count as one. Images of evaluations are not counted. Values are "
        "means over seeds, with the lowest and highest in brackets. Reward: share of 512 images for held-out prompts that "
        "are right (256 images during training, so a crossing is known to about ± 0.03 in reward). Judge: a network "
        "trained on correct drawings, never optimised. Divergence: mean squared difference of the velocity from that of "
        "the pretrained model, along evaluation samples. Minutes: of training with one thread. The records were made "
        "while other work shared the cores, some runs at half the speed of others, so compare evaluations rather than "
        "minutes. Methods with a trust region make several updates a rollout: with one update their ratio stays 1 and "
        "nothing is clipped. The published objective of AWM is on-policy.",
        table(runs),
        "![Reward against evaluations and minutes; judge against divergence](algorithms.png)",
        "## Cost of a given reward",
        "Thousand denoiser evaluations, interpolated between the evaluations of the run:",
        costs(runs, "nfe", 1e3, "{:.0f}"),
        "Minutes:",
        costs(runs, "seconds", 60, "{:.1f}"),
        f"Evaluations of {SLOW} in units of those of {FAST}, to the same reward with the same seed (published: up to 24 times, "
        "arXiv:2509.25050, on models a thousand times larger):",
        ratios(runs),
    )
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Trains, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-algorithms"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    jobs = [job(recipe, seed) for seed in options.seeds for recipe in METHODS]
    curves = Bench(options.runs, options.out / "records" / "recipes").curves(jobs, options.jobs)
    done = list(zip(jobs, curves, strict=True))
    runs = {name: [c for j, c in done if j.recipe == recipe] for recipe, name in METHODS.items()}
    plot(runs, options.out / "algorithms.png")
    written = text(runs, options.seeds)
    (options.out / "algorithms.md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
