"""Over-optimisation: the gold reward during training against a learned proxy that was fitted to it.

    python -m benchmarks.overoptimisation --seeds 0 1 2 --jobs 2      trains what is missing, then writes page and plot

For every seed an ensemble of small reward models (benchmarks/arenas/proxies.py) is fitted to noisy gold labels of drawings by the
pretrained model. The model is then trained against it in several ways, with everything else equal and with the gold reward
watched. Runs are resumable and use one CPU thread each, and a run with a record is not repeated.
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
"""Name of the variant -> one course a seed."""


def peak_indices(courses: Sequence[Course]) -> list[int]:
    """Return for each seed the index of the evaluation at which gold, mean over the *other* seeds, is highest.

    A choice by the seed's own gold would be biased upwards.
    """
    gold = np.array([c.gold for c in courses])
    alone = len(gold) == 1
    return [int((gold if alone else np.delete(gold, seed, axis=0)).mean(0).argmax()) for seed in range(len(gold))]


def change(gained: Sequence[float], errors: Sequence[float]) -> str:
    """Return the mean over seeds with its standard error, from those of the seeds [seeds]. A clear change is bold."""
    mean, error = float(np.mean(gained)), math.sqrt(sum(e**2 for e in errors)) / len(errors)
    text = f"{mean:+.3f} ± {error:.3f}"
    return f"**{text}**" if abs(mean) > CLEAR * error else text


def table(runs: Courses, before: float) -> str:
    """Return a table of the gains and losses of each variant; mean and range over seeds."""
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
        best = peak_indices(found)
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


def quality_table(quality: Sequence[Sequence[Mapping[str, float]]]) -> str:
    """Return a table of the quality of the proxies on held-out drawings, over seeds and members."""
    rows = []
    for name, chosen in (("one proxy", slice(0, -1)), ("mean of the ensemble", slice(-1, None))):
        each = [one for of_seed in quality for one in of_seed[chosen]]
        rows.append((name, *(spread([one[key] for one in each]) for key in ("auc", "auc_of_a_prompt", "accuracy"))))
    return markdown(("", "AUC", "AUC within a prompt", "accuracy at the median"), rows)


def plot(runs: Courses, before: float, path: Path) -> None:
    """Plot proxy and gold against evaluations, and gold against the proxy's score and against the divergence."""
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
    """Return docs/benchmarks/overoptimisation.md; `before` is the gold reward of the pretrained model."""
    prompts = len(load_prompts("shapes:train"))
    budget = np.mean([course.nfe[-1] for course in runs[VARIANTS[0].name]]) / 1e3
    anchored = next(variant.anchor for variant in VARIANTS if variant.anchor)
    lines = (
        "# Over-optimisation of a learned proxy",
        f"`python -m benchmarks.overoptimisation --seeds {' '.join(map(str, seeds))}` writes this page. "
        "The set-up is that of arXiv:2210.10760 and 2310.02743 on the shapes task. A gold reward, here GenEval's "
        "rules and nothing but the requested objects in the image, labels samples of the pretrained model. Small "
        "reward models, the proxies, are fitted to these labels. Training uses only the proxies; gold is watched.",
        "## The proxies",
        f"A seed's ensemble is {PROXIES.members} convolutional networks that read the prompt (`rewards/judge.py`, "
        f"with {PROXIES.channels} channels instead of 24), fitted by cross-entropy for {PROXIES.steps} "
        f"steps of {PROXIES.batch} to {LEARNT * prompts:,} drawings by tiny-sd3, {LEARNT} of each of the {prompts} "
        f"training prompts, with {PROXIES.flipped:.0%} of the labels flipped. Members share the labels, "
        "including the wrong ones, and differ in initial weights and order, as in 2310.02743. Every seed has different "
        "wrong labels and different networks. A score is the logit, scaled to mean 0 and standard deviation 1 over "
        f"those drawings. The table is for {HELD_OUT * prompts:,} held-out drawings with correct labels; values are "
        "means over seeds (and members), with the lowest and highest in brackets. AUC is the share of pairs of a right and "
        "a wrong drawing in which the right one scores higher. Training compares drawings of the same prompt, so the AUC "
        "within a prompt matters.",
        quality_table(quality),
        "## Training against them",
        f"`{RECIPE}` (DiffusionNFT on tiny-sd3, a recipe without an anchor), {STEPS} steps of 12 prompts × 12 "
        f"samples, about {budget:.0f} thousand evaluations of the denoiser; everything else is equal. An evaluation uses "
        "256 drawings for training prompts, with the same prompts and noise each time, because the question is "
        "whether the proxy holds where it is used, not whether it generalises. The model is trained against",
        "- **one proxy**: the first member of the ensemble.\n"
        "- **ensemble**: all members, by their mean, by the lowest score (WCO), or by the mean minus the variance (UWO with "
        "λ = 1).\n"
        f"- **PAR**: the mean of σ(r − r_ref) over {REFERENCES} drawings of the same prompt by the pretrained model "
        "(arXiv:2502.18770), drawn once and not among the evaluations.\n"
        f"- **KL**: one proxy, with the squared distance of the velocity from that of the pretrained model in the loss, with "
        f"coefficient {anchored:g}; for given noise, the KL is proportional to it.\n"
        "- **gold itself**: the reward that the proxies represent. This row separates the effect of the proxies from that of "
        "training itself. Its proxy is the mean of all members.",
        "Values are means over seeds, with the lowest and highest in brackets.",
        table(runs, before),
        "- **proxy gained**: raw score of the member, or mean score of the members, at the end minus that before training.\n"
        "- **peak**: the evaluation at which gold, mean over the other seeds, is highest. The maximum of a seed's own gold "
        "would be partly luck.\n"
        f"- **gold gained by the peak**: from {before:.3f}, the share of right drawings among all labelled drawings of the "
        "pretrained model; evaluation 0, with 256 drawings, estimates it to within ± 0.03.\n"
        f"- **bold**: larger than {CLEAR} standard errors. The errors assume independent evaluations; since these share prompts "
        "and noise, differences are known more precisely.\n"
        "- **variance of the members**: variance of the members' scores of a drawing, mean over drawings.\n"
        "- **divergence**: as for KL above, on the samples of the last step.",
        "![Proxy and gold against evaluations; gold against the proxy and against divergence](overoptimisation.png)",
    )
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Draw, fit, train, print and write."""
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
