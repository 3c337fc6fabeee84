"""Section of docs/verification.md on the Gaussian arena."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.arenas.gaussian import BETA, FINE, GROUP, STEPS, TASK, Cell, build_config, measure, train
from benchmarks.arenas.gaussian_forward import FORWARD
from benchmarks.arenas.gaussian_reverse import REVERSE
from benchmarks.arenas.number_format import spread_of_seeds
from difrl.tasks.exact.gaussian_solutions import Normal

CELLS = (*REVERSE, *FORWARD)
BUDGET = 400_000
"""Number of denoiser evaluations of every cell: rollouts, likelihoods, references and anchors."""


def run(name: str, seed: int, folder: Path) -> dict[str, float]:
    """Train a cell within the budget and measure it."""
    cell = next(cell for cell in CELLS if cell.name == name)
    TASK.save(folder, STEPS)
    return asdict(measure(train(build_config(folder, cell.sections, seed=seed, budget=BUDGET)), cell.answer))


def page(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Return the section in Markdown."""
    seeds = len(next(iter(results.values())))
    return "\n".join(
        [
            _introduction(seeds),
            "### Reverse likelihoods",
            "",
            _table(REVERSE, results),
            "### Forward likelihoods",
            "",
            _table(FORWARD, results),
            "### Why each one ends where it does",
            "",
            *[f"* **{cell.name}**: {cell.why}" for cell in CELLS],
            "",
        ]
    )


def _introduction(seeds: int) -> str:
    cov = np.array(TASK.covariance)
    start = np.mean(
        [
            Normal(np.array(mean), cov).kl(Normal(np.array(mean), cov).tilted(np.array(direction), BETA))
            for mean, direction in zip(TASK.means, TASK.directions, strict=True)
        ]
    )
    counted = f"{seeds} seeds" if seeds > 1 else "one seed"
    return f"""## The Gaussian task

For each of {len(TASK.means)} prompts the base model generates N(m, Σ) in three dimensions by flow matching, the reward is a·x0,
and the optimum of E[r] − β KL at β = {BETA:g} is π\\* = N(m + Σa, Σ). The network is the exact denoiser of N(μ(t), Σ);
training moves the table μ(t) ({STEPS} times, linear between them), in which both π\\* and the optimum over paths of
every sampler lie. Untrained it is {start:.2f} nats from π\\*. Every cell spends the same {BUDGET:,} denoiser
evaluations (likelihoods, references and anchors included) in groups of {GROUP}, with {STEPS} denoising steps, advantages without
a division (unless the row has one), and a learning rate that falls to 0.

Columns are KL divergences in nats, means over the prompts and {counted} (lowest to highest seed). The trained network is
affine, so where its sampler ends is computed from its weights and not estimated from samples.

* **from its fixed point**: KL(what the training sampler generates ‖ the closed form of this method's fixed point). Small
  means that the trainer agrees with the formula; the rest is the noise of the optimiser.
* **bias**: KL(that closed form ‖ π\\*), the method's own distance from π\\* on this task with an infinite budget.
  "none": it has no fixed point.
* **from π\\***: KL(what the training sampler generates ‖ π\\*) at this budget.
* **its ODE**: the same for the ODE of the trained network in {FINE} steps, as a user would sample it.
* **β̂, residue**: the β whose tilt N(m + Σa/β, Σ) has the mean nearest to the fixed point's, and the remaining distance
  of the means. Another coefficient corrects a wrong β, but not the residue.

The closed forms are derived in `difrl/tasks/exact/gaussian_solutions.py` (chains) and `difrl/tasks/exact/gaussian_forward.py`
(forward likelihoods); recipes are in `benchmarks/arenas/gaussian_reverse.py` and `gaussian_forward.py`; `tests/tasks/exact`
compares the same cells with the same closed forms.
"""


def _table(cells: Sequence[Cell], results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    lines = [
        "| row | likelihood | objective | anchor to base | from its fixed point | bias | from π\\* | its ODE | β̂, residue |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        rows = results[cell.name]
        nearest = "–" if cell.answer is None else f"{rows[0]['nearest_beta']:.2f}, {rows[0]['residue']:.4f}"
        cells_of_row = (
            cell.name,
            cell.likelihood,
            cell.objective,
            cell.anchor,
            *(
                spread_of_seeds([row[key] for row in rows])
                for key in ("to_answer", "answer_to_optimum", "to_optimum", "ode_to_optimum")
            ),
            nearest,
        )
        lines.append("| " + " | ".join(cells_of_row) + " |")
    return "\n".join([*lines, ""])
