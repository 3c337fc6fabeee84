"""Over-optimisation: what training against a learned proxy does to the gold reward that the proxy was fitted to.

    python -m benchmarks.overoptimisation --seeds 0 1 2 --jobs 2      makes what is missing, then writes page and plot

For every seed an ensemble of small reward models (benchmarks/arenas/proxies.py) is fitted to noisy gold labels of drawings by the
pretrained model; then the model is trained against it in several ways, everything else alike, with the gold reward watched.
Runs are resumable, one CPU thread each, and one whose record is kept is only read.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.arenas.proxy_runs import (
    HELD_OUT,
    LEARNT,
    PROXIES,
    RECIPE,
    REFERENCES,
    STEPS,
    VARIANTS,
    Course,
    Proxies,
    job,
)
from benchmarks.common import CLEAR, COLORS, Bench, markdown, plt, save, spread
from difrl.data.prompts import load_prompts

Courses = Mapping[str, Sequence[Course]]
"""By the name of the variant, one a seed."""


def peaks(courses: Sequence[Course]) -> list[int]:
    """For each seed the evaluation at which gold, mean over the *other* seeds, is highest.

    So the seed's own gold there was not chosen for being high, which would flatter it.
    """
    gold = np.array([c.gold for c in courses])
    alone = len(gold) == 1
    return [int((gold if alone else np.delete(gold, seed, axis=0)).mean(0).argmax()) for seed in range(len(gold))]


def change(gained: Sequence[float], errors: Sequence[float]) -> str:
    """The mean over seeds, with its standard error from those of the seeds [seeds]; bold where it is clear."""
    mean, error = float(np.mean(gained)), math.sqrt(sum(e**2 for e in errors)) / len(errors)
    said = f"{mean:+.3f} ± {error:.3f}"
    return f"**{said}**" if abs(mean) > CLEAR * error else said


def table(runs: Courses, before: float) -> str:
    """Markdown: what each variant won and lost; mean and range over seeds."""
    header = (
        "training against",
        "proxy gained",
        "gold at its peak",
        "peak after steps",
        "gold at the end",
        "gold gained by the peak",
        "and from there to the end",
        "judge (watched) at the peak",
        "at the end",
        "variance of the members at the end",
        "divergence at the end",
    )
    rows = []
    for variant in VARIANTS:
        found = runs[variant.name]
        best = peaks(found)
        top, end = [c.gold[k] for c, k in zip(found, best, strict=True)], [c.gold[-1] for c in found]
        errors = [c.stderr[k] for c, k in zip(found, best, strict=True)]
        after = sorted({k * STEPS // (len(c.gold) - 1) for c, k in zip(found, best, strict=True)})
        rows.append(
            (
                variant.title,
                spread([variant.proxy(c)[-1] - variant.proxy(c)[0] for c in found], "{:+.2f}"),
                spread(top),
                " or ".join(map(str, after)),
                spread(end),
                change([t - before for t in top], errors),
                change(
                    [e - t for t, e in zip(top, end, strict=True)],
                    [math.hypot(c.stderr[-1], e) for c, e in zip(found, errors, strict=True)],
                ),
                spread([c.judge[k] for c, k in zip(found, best, strict=True)]),
                spread([c.judge[-1] for c in found]),
                spread([c.disagreement[-1] for c in found], "{:.2f}"),
                spread([c.divergence[-1] for c in found], "{:.2f}"),
            )
        )
    return markdown(header, rows)


def examined(quality: Sequence[Sequence[Mapping[str, float]]]) -> str:
    """Markdown: how good the proxies are on drawings that they have not seen, over seeds and members."""
    rows = []
    for name, chosen in (("one proxy", slice(0, -1)), ("mean of the ensemble", slice(-1, None))):
        each = [one for of_seed in quality for one in of_seed[chosen]]
        rows.append((name, *(spread([one[key] for one in each]) for key in ("auc", "auc_of_a_prompt", "accuracy"))))
    return markdown(("", "AUC", "AUC within a prompt", "accuracy at the median"), rows)


def plot(runs: Courses, before: float, path: Path) -> None:
    """Proxy and gold against evaluations, and gold against what was paid for it: the proxy's score, and divergence."""
    figure, grid = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    axes = grid.ravel()
    for variant, color in zip(VARIANTS, COLORS, strict=False):
        found = runs[variant.name]
        gold = [c.gold for c in found]
        lines = (
            ([c.nfe / 1e3 for c in found], [variant.proxy(c) for c in found]),
            ([c.nfe / 1e3 for c in found], gold),
            ([variant.proxy(c) for c in found], gold),
            ([np.sqrt(c.divergence) for c in found], gold),
        )
        for ax, (xs, ys) in zip(axes, lines, strict=True):
            for x, y in zip(xs, ys, strict=True):
                ax.plot(x, y, color=color, alpha=0.2, linewidth=0.8)
            x, y = np.mean(xs, axis=0), np.mean(ys, axis=0)
            ax.plot(x, y, color=color, linewidth=2, marker="o", markersize=3, label=variant.title)
            arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 2}
            ax.annotate("", (x[-1], y[-1]), (x[-2], y[-2]), arrowprops=arrow)
    proxy, gold_said = "proxy's raw score (pretrained model: 0 ± 1)", "gold: share of drawings that are right"
    axes[0].set(xlabel="denoiser evaluations (thousands)", ylabel=proxy)
    axes[1].set(xlabel="denoiser evaluations (thousands)", ylabel=gold_said)
    axes[2].set(xlabel=proxy, ylabel=gold_said)
    axes[3].set(xlabel="√ divergence from the pretrained model", ylabel=gold_said)
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[1:]:
        ax.axhline(before, color="#999999", linewidth=0.8, linestyle="--")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    save(figure, path)


def text(runs: Courses, quality: Sequence[Sequence[Mapping[str, float]]], before: float, seeds: Sequence[int]) -> str:
    """docs/benchmarks/overoptimisation.md; `before` is the gold reward of the pretrained model."""
    prompts = len(load_prompts("shapes:train"))
    budget = np.mean([course.nfe[-1] for course in runs[VARIANTS[0].name]]) / 1e3
    anchored = next(variant.anchor for variant in VARIANTS if variant.anchor)
    lines = (
        "# Over-optimisation of a learned proxy",
        f"`python -m benchmarks.overoptimisation --seeds {' '.join(map(str, seeds))}` writes this page. "
        "The set-up is that of arXiv:2210.10760 and 2310.02743 on the shapes task: a gold reward, here GenEval's "
        "rules (nothing in the picture but what was asked for), labels samples of the pretrained model; small "
        "reward models are fitted to these labels and are all that training ever hears of; gold is watched.",
        "## The proxies",
        f"A seed's ensemble is {PROXIES.members} convolutional networks that read the prompt (`rewards/judge.py`, "
        f"{PROXIES.channels} channels where the shipped judge has 24), fitted by cross-entropy for {PROXIES.steps} "
        f"steps of {PROXIES.batch} to {LEARNT * prompts:,} drawings by tiny-sd3, {LEARNT} of each of the {prompts} "
        f"training prompts, with {PROXIES.flipped:.0%} of the labels turned over. Members have the labels in common, "
        "the wrong ones included, and differ in initial weights and order, as in 2310.02743; every seed has other "
        "wrong labels and other networks. A score is the logit, scaled to mean 0 and standard deviation 1 over "
        f"those drawings. On {HELD_OUT * prompts:,} drawings that they have not seen, against labels that are right; "
        "mean over seeds (and members), in brackets the lowest and highest. AUC: the share of pairs of a right and "
        "a wrong drawing in which the right one scores higher; within a prompt is what counts in training, which "
        "compares the drawings of a prompt.",
        examined(quality),
        "## Training against them",
        f"`{RECIPE}` (DiffusionNFT on tiny-sd3, which has no anchor of its own), {STEPS} steps of 12 prompts × 12 "
        f"samples, about {budget:.0f} thousand evaluations of the denoiser; all else is the same for all. Evaluations "
        "are of 256 drawings for prompts of training, the same prompts and noise each time, for what is asked is "
        "whether the proxy holds where it is used, and not whether it generalises. Trained against",
        "- **one proxy**: the first member of the ensemble.\n"
        "- **ensemble**: all members, by their mean, by the lowest (WCO), or by the mean less the variance (UWO with "
        "λ = 1).\n"
        f"- **PAR**: the mean of σ(r − r_ref) over {REFERENCES} drawings of the same prompt by the pretrained model "
        "(arXiv:2502.18770), drawn once and not among the evaluations.\n"
        f"- **KL**: one proxy, and in the loss with coefficient {anchored:g} the squared distance of the velocity from "
        "the pretrained model's, which for a given noise is what KL is proportional to.\n"
        "- **gold itself**: the reward that the proxies stand for; so one sees what is due to them, and what the "
        "training does by itself. The proxy of this row is the mean of all members.",
        "Mean over seeds, in brackets the lowest and highest.",
        table(runs, before),
        "- **proxy gained**: raw score of the member, or the mean of the members, at the end less that before.\n"
        "- **peak**: the evaluation at which gold, mean over the other seeds, is highest; where a seed's own gold is "
        "highest is in part its luck.\n"
        f"- **gold gained by the peak**: from {before:.3f}, the share of all those labelled drawings of the "
        "pretrained model that are right; evaluation 0, of 256, is that to within ± 0.03.\n"
        f"- **bold**: beyond {CLEAR} standard errors, in which evaluations count as independent. They have prompts and "
        "noise in common, so a difference of two is known better than that.\n"
        "- **variance of the members**: over the members' scores of a drawing, mean over drawings.\n"
        "- **divergence**: as for KL above, on the samples of the last step.",
        "![Proxy and gold against evaluations; gold against the proxy and against divergence](overoptimisation.png)",
    )
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Draws, fits, trains, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-overoptimisation"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    records = options.out / "records" / "overoptimisation"
    bench = Bench(options.runs, records, Course)
    ensembles = [Proxies(options.runs, records / f"proxies-{seed}.json", seed) for seed in options.seeds]
    jobs = [job(variant, proxies.folder, proxies.seed) for proxies in ensembles for variant in VARIANTS]
    needed = {j.name.rpartition("-")[2] for j in jobs if not bench.known(j)}
    quality = [proxies.quality(str(proxies.seed) in needed) for proxies in ensembles]
    done = list(zip(jobs, bench.curves(jobs, options.jobs), strict=True))
    runs = {v.name: [c for j, c in done if j.name.rpartition("-")[0] == v.name] for v in VARIANTS}
    plot(runs, ensembles[0].gold, options.out / "overoptimisation.png")
    written = text(runs, quality, ensembles[0].gold, options.seeds)
    (options.out / "overoptimisation.md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
