"""Noise of policy gradients with reverse (DDPO-type) and forward (AWM-type) likelihoods, and of the ratios they clip.

    python benchmarks/variance.py                          a few minutes on one CPU thread; table and plot into docs/

1. Gradients of many independent small batches at the same weights, from the trainer itself, at equal denoiser evaluations: the
   trace of their covariance compared with the squared norm of their mean.
2. log ρ of new samples of the old policy after one step of training, for each denoising step, plain and normalised as in
   GRPO-Guard (arXiv:2510.22319).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import COLORS, markdown, plt, save
from torch import Tensor

from difrl.config.load import read_config
from difrl.core import Likelihoods
from difrl.data.prompts import load_prompts
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.paths import recipes
from difrl.scoring import Scorer
from difrl.training.trainer import Trainer

SMALL = ("data.prompts_per_step=2", "data.group_size=8", "train.updates_per_step=1", "train.max_grad_norm=1.0e+9")
STILL = ("train.lr=0.0", "anchors=[]", "watch=[]")
NINE = "likelihood.decisions=9"  # as many as the reverse chain has stochastic steps
ESTIMATORS: Mapping[str, tuple[str, ...]] = {
    "reverse, Flow-GRPO": ("flow_grpo",),
    "reverse, GRPO-Guard": ("grpo_guard",),
    "forward, plain": ("awm", NINE, "likelihood.weighting=uniform"),
    "forward, AWM": ("awm", NINE),
}


def build_trainer(recipe: str, *overrides: str) -> Trainer:
    """Build the trainer of a recipe, before its first step."""
    config = read_config(recipes()[recipe], overrides)
    scorer = Scorer.build(config.rewards, config.watch, "cpu")
    return Trainer(config, load_diffusion_policy(config), scorer, load_prompts(config.data.train), DistributedContext())


@dataclass(frozen=True)
class Noise:
    """Noise and signal of N gradients from their Gram matrix [N, N], with jackknife standard errors."""

    gram: Tensor
    evaluations: float
    """Number of denoiser evaluations of one batch."""

    @property
    def noise(self) -> float:
        """tr Cov(g), unbiased: the sum of the variances of its components."""
        n = len(self.gram)
        return float((self.gram.trace() - self.gram.sum() / n) / (n - 1))

    @property
    def signal(self) -> float:
        """‖E g‖², unbiased: the mean product of different gradients. ‖mean of g‖² would include noise."""
        n = len(self.gram)
        return float((self.gram.sum() - self.gram.trace()) / (n * (n - 1)))

    @property
    def signal_stderr(self) -> float:
        """Standard error of the signal, from leaving out one batch at a time."""
        n = len(self.gram)
        kept = (~torch.eye(n, dtype=torch.bool)).unbind()
        signals = torch.tensor([Noise(self.gram[rows][:, rows], 0.0).signal for rows in kept])
        return float(((n - 1) * signals.var(unbiased=False)).sqrt())

    @property
    def measured(self) -> bool:
        """Return whether the signal is more than two standard errors above 0."""
        return self.signal > 2 * self.signal_stderr

    @property
    def ratio(self) -> float:
        """tr Cov(g) / ‖E g‖²: the number of batches over which averaging reduces the noise to the signal."""
        return self.noise / self.signal

    @property
    def lowest(self) -> float:
        """The ratio for the largest signal within two standard errors."""
        return self.noise / (max(self.signal, 0.0) + 2 * self.signal_stderr)

    @property
    def highest(self) -> float:
        """The ratio for the smallest signal within two standard errors; inf if that is not positive."""
        return self.noise / (self.signal - 2 * self.signal_stderr) if self.measured else math.inf


def measure(estimator: str, weights: Mapping[str, Tensor] | None, batches: int) -> Noise:
    """Measure gradients of independent batches at the given weights (None: the pretrained ones), without changing them."""
    recipe, *overrides = ESTIMATORS[estimator]
    trainer = build_trainer(recipe, *SMALL, *STILL, *overrides)
    load(trainer, weights or {})
    gradients = []
    for number in range(batches):
        trainer.step(number)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None]))
    stacked = torch.stack(gradients).double()
    return Noise(stacked @ stacked.T, trainer.evaluations / batches)


@torch.no_grad()
def load(trainer: Trainer, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the model of a trainer."""
    for name, value in weights.items():
        trainer.policy.parameters[name].copy_(value)


def trained(steps: int) -> dict[str, Tensor]:
    """Return the weights after a few updates with AWM."""
    trainer = build_trainer("awm", f"train.steps={steps}", "train.lr=4.0e-4", "data.prompts_per_step=8", "watch=[]")
    for number in range(steps):
        trainer.step(number)
    return {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}


@dataclass(frozen=True)
class Ratios:
    """log ρ [B, J] of samples of the old policy at times t [J], plain and normalised."""

    t: Tensor
    plain: Tensor
    normalised: Tensor


def ratios(samples: int, warm_up: int) -> Ratios:
    """Draw samples after some steps of GRPO-Guard, train one more step, and evaluate the samples again."""
    trainer = build_trainer("grpo_guard", "watch=[]")
    for number in range(warm_up):
        trainer.step(number)
    policy, prompts = trainer.policy, trainer.prompts
    asked = [prompts[i % len(prompts)] for i in range(samples)]
    key, rows = NoiseKey(trainer.config.seed, 10_000), torch.arange(samples)
    rollout = policy.rollout(asked, rows, rows, key)
    decisions = policy.decisions(rollout, key)
    trainer.step(warm_up)
    # The step moved every snapshot to the new weights: only the recorded likelihoods are those of the old ones.
    with torch.no_grad():
        parts = [
            policy.likelihoods(rollout.select(chosen), decisions.select(chosen, slice(None)))
            for chosen in rows.split(16)
        ]
    lik = Likelihoods.cat(parts)
    plain = lik.log_ratio("old")
    return Ratios(decisions.tensors["t"][0], plain, lik["scale"] * (plain + lik["bias"]))


def noise_table(found: Mapping[str, Mapping[str, Noise]]) -> str:
    """Return a table of the estimators at each set of weights."""
    header = (
        "gradient",
        "weights",
        "batches",
        "evaluations a batch",
        "noise / signal",
        "thousand evaluations to noise = signal",
    )
    rows = [
        (name, weights, f"{len(n.gram)}", f"{n.evaluations:.0f}", _range(n, 1.0), _range(n, n.evaluations / 1e3))
        for weights, row in found.items()
        for name, n in row.items()
    ]
    return markdown(header, rows)


def _range(noise: Noise, unit: float) -> str:
    """Return a ratio with the range of two standard errors of its signal, or a lower bound."""
    if not noise.measured:
        return f"over {_figure(noise.lowest * unit)}"
    return f"{_figure(noise.ratio * unit)} ({_figure(noise.lowest * unit)} to {_figure(noise.highest * unit)})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def ratio_table(found: Ratios) -> str:
    """Return a table of one row a denoising step, in thousandths."""
    header = ("t", "mean of log ρ", "spread of log ρ", "mean of log ρ̃", "spread of log ρ̃")
    rows = []
    for j, t in enumerate(found.t.tolist()):
        cells = []
        for values in (found.plain[:, j], found.normalised[:, j]):
            error = float(values.std()) / len(values) ** 0.5
            cells += [f"{1e3 * float(values.mean()):+.3f} ± {1e3 * error:.3f}", f"{1e3 * float(values.std()):.3f}"]
        rows.append((f"{t:.2f}", *cells))
    return markdown(header, rows)


def plot(noises: Mapping[str, Mapping[str, Noise]], found: Ratios, path: Path) -> None:
    """Plot noise against signal, and log ρ by step, plain and normalised."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    _bars(axes[0], noises)
    for ax, values, title in zip(
        axes[1:], (found.plain, found.normalised), ("log ρ", "log ρ̃, normalised (GRPO-Guard)"), strict=True
    ):
        mean, std = 1e3 * values.mean(0), 1e3 * values.std(0)
        ax.axhline(0, color="#999999", linewidth=0.8)
        ax.fill_between(found.t, mean - std, mean + std, alpha=0.25, color=COLORS[0], label="± one standard deviation")
        ax.plot(found.t, mean, color=COLORS[0], marker="o", markersize=3, label="mean")
        ax.set(title=title, xlabel="t, from noise (1) to data (0)", ylabel="thousandths", xlim=(1.02, 0))
    axes[1].legend(frameon=False, fontsize="small")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _bars(ax: plt.Axes, noises: Mapping[str, Mapping[str, Noise]]) -> None:
    """Plot ratios with their ranges. A pale bar with an arrow is a lower bound."""
    for place, (weights, row) in enumerate(noises.items()):
        for i, noise in enumerate(row.values()):
            x, known = i + 0.38 * (place - 0.5), noise.measured
            height = noise.ratio if known else noise.lowest
            ax.bar(
                x, height, 0.36, color=COLORS[place], alpha=1.0 if known else 0.35, label=weights if i == 0 else None
            )
            errors = [[height - noise.lowest], [noise.highest - height if known else height]]
            ax.errorbar(x, height, errors, color="#333333", capsize=3, lolims=not known)
    names = next(iter(noises.values()))
    ax.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize="x-small")
    ax.set(title="gradient noise / signal", ylabel="tr Cov / ‖mean‖², a batch of 16", yscale="log")
    ax.legend(frameon=False, fontsize="small", title="weights")


def text(noises: Mapping[str, Mapping[str, Noise]], found: Ratios) -> str:
    """Return docs/benchmarks/variance.md."""
    lines: Sequence[str] = (
        "# Noise of policy gradients",
        "`python benchmarks/variance.py` writes this page. Model: tiny-sd3; reward: GenEval's rules; one CPU thread.",
        "## Reverse and forward likelihoods",
        "Gradients of independent batches of 16 samples (2 prompts) at the same weights, each from the trainer, with 10 "
        "evaluations to draw a sample and 9 decisions to learn from it for every likelihood. Noise is the trace of the "
        "covariance of a batch's gradient, signal the squared norm of its mean, both unbiased. The brackets hold the ratio for "
        "a signal two standard errors (jackknife) higher and lower. If the signal is not two standard errors above 0, only a "
        "lower bound of the ratio is known. The last column is the cost of averaging until noise and signal are equal.",
        noise_table(noises),
        _noise_summary(next(iter(noises.values()))),
        "## log ρ of each denoising step",
        f"{len(found.plain)} new samples of the old policy, evaluated after one more step of `configs/grpo_guard.yaml` "
        "(4 updates), in thousandths. log ρ = log N averaged over the 512 numbers of a latent; log ρ̃ = std (log ρ + "
        "‖Δmean‖² / (2 std²)), arXiv:2510.22319. For samples of the old policy, E log ρ = −KL(old ‖ θ) < 0 and "
        "its spread is ‖Δmean‖ / (D std), which is large if a step adds little noise; log ρ̃ has mean 0 and spread "
        "‖Δmean‖ / D.",
        ratio_table(found),
        _ratio_summary(found),
        "![Noise against signal; log ρ by step](variance.png)",
    )
    return "\n\n".join(lines) + "\n"


def _noise_summary(row: Mapping[str, Noise]) -> str:
    """Return a comparison of the first estimator with each of the others."""
    first, *others = row
    known, bound = row[first].measured, row[first].lowest
    best, prefix = (row[first].ratio, "") if known else (bound, "over ")
    known_others = {name: row[name].ratio for name in others if row[name].measured}
    factors = [
        f"{prefix}{_figure(best / ratio)} times the evaluations of {name}" for name, ratio in known_others.items()
    ]
    needed = ", ".join(factors) or "more batches than these for a comparison"
    return (
        f"At the pretrained weights {first} needs {needed}. The signals are gradients of different surrogates. This "
        "compares the precision of each for its evaluations, not the value of a step along it."
    )


def _ratio_summary(found: Ratios) -> str:
    below = int((found.plain.mean(0) < 0).sum())
    plain, normalised = (float(v.std(0).max() / v.std(0).min()) for v in (found.plain, found.normalised))
    off = (found.normalised.mean(0) / (found.normalised.std(0) / len(found.normalised) ** 0.5)).abs().max()
    return (
        f"mean(log ρ) is below 0 at {below} of {len(found.t)} steps; mean(log ρ̃) is at every step within {float(off):.1f} "
        f"standard errors of 0. The largest spread of a step is {plain:.1f} times the smallest for log ρ, and "
        f"{normalised:.1f} times for log ρ̃."
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, default=24, help="gradients of each estimator")
    parser.add_argument("--samples", type=int, default=256, help="samples for log ρ")
    parser.add_argument("--updates", type=int, default=6, help="AWM steps behind the second set of weights")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    points = {"pretrained": None, f"after {options.updates} AWM steps": trained(options.updates)}
    noises = {
        point: {name: measure(name, weights, options.batches) for name in ESTIMATORS}
        for point, weights in points.items()
    }
    found = ratios(options.samples, warm_up=2)
    plot(noises, found, options.out / "variance.png")
    written = text(noises, found)
    (options.out / "variance.md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
