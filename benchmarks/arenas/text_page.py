"""Section of docs/verification.md on the text arena."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.arenas.number_format import spread_of_seeds
from benchmarks.arenas.text import BETA, GROUP, Cell, build_config, measure, train
from benchmarks.arenas.text_cells import CELLS
from difrl.tasks.exact.enumerable import EnumerableTask
from difrl.tasks.exact.enumerable_solutions import completion_probabilities, exponential_tilt, kl


def run(name: str, seed: int, folder: Path) -> dict[str, float]:
    """Train a cell on the task of a seed and measure it."""
    cell, task = next(cell for cell in CELLS if cell.name == name), EnumerableTask(seed)
    config = build_config(task.save(folder), cell, prompts=task.prompts, seed=seed)
    return asdict(measure(train(config), cell, task))


def page(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Return the section in Markdown."""
    seeds = len(next(iter(results.values())))
    return "\n".join([_introduction(seeds), _table(CELLS, results), _reading()])


def _introduction(seeds: int) -> str:
    tasks = [EnumerableTask(seed) for seed in range(seeds)]
    starts = [
        kl(completion_probabilities(base), exponential_tilt(completion_probabilities(base), reward, BETA))
        for task in tasks
        for base, reward in zip(task.logits, task.rewards, strict=True)
    ]
    counted = f"{seeds} seeds" if seeds > 1 else "one seed"
    return f"""## The enumerable language model

A causal language model of transformers whose vocabulary is four letters (and special tokens), whose completions have
three tokens, and whose logits after every prefix are free: any distribution over the 64 completions of a prompt is one
setting of its weights. Logits of the base model and rewards of all completions are standard normal, drawn anew for
every prompt and seed. Untrained it is {np.mean(starts):.2f} nats from π\\* ∝ π_ref exp(r/β), the optimum of
E[r] − β KL(π ‖ π_ref) at β = {BETA:g}. Every cell is a recipe for the ordinary trainer: {tasks[0].prompts} prompts with
{GROUP} samples each a step, one update a step, `clipped` with leave-one-out advantages (unless the row differs),
{CELLS[0].steps} steps with a learning rate that falls to 0.

### The objective of each KL estimator in each place

Columns are KL divergences in nats, means over prompts and {counted} (lowest to highest seed). x is a prefix, a the next token,
Q(x, a) the mean reward of the continuations. Fixed points are computed exactly (`difrl/tasks/exact/enumerable_solutions.py`
derives them; `tests/tasks/exact` also finds them by exact gradients), and the trained distribution is read from the weights.

* **from its fixed point**: KL(trained ‖ fixed point of this setting). Small means that the trainer agrees with the
  formula; the rest is the noise of sampling.
* **bias**: KL(that fixed point ‖ π\\*). "none": it has no fixed point.
* **from π\\***: KL(trained ‖ π\\*) at the end of the run.
* **likeliest**: the trained probability of the completion of highest reward.
"""


def _table(cells: Sequence[Cell], results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    lines = [
        "| row | estimator | place | objective | from its fixed point | bias | from π\\* | likeliest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        keys = ("to_answer", "answer_to_optimum", "to_optimum")
        figures = [spread_of_seeds([row[key] for row in results[cell.name]]) for key in keys]
        share = f"{np.mean([row['likeliest'] for row in results[cell.name]]):.2f}"
        lines.append("| " + " | ".join((cell.name, cell.estimator, cell.place, cell.optimises, *figures, share)) + " |")
    return "\n".join([*lines, ""])


def _reading() -> str:
    return """### Conclusions

* **Only two settings reach π\\***: k1 in the reward, summed over the whole sequence, and a regression of the sequence's whole
  log-ratio on rewards (CRD on summed Δ, anchored preference). In both a token also counts for the tokens after it.
* **A KL in the loss is token by token.** k2, the full-vocabulary reverse KL and k1 subtracted from each token's own advantage are
  one method with different noise: each prefix trades the mean reward of the continuations against its own KL, and ignores
  the later penalties that a token leads to.
* **k1 as a loss** has an expected gradient of exactly 0, so it would have no effect: recipes with it are rejected.
* **k3 as a loss** estimates KL(π ‖ π_ref) and follows the gradient of KL(π_ref ‖ π): it ends where full-vocabulary forward KL
  ends.
* **Dividing advantages by a standard deviation** multiplies β by it if the KL is in the loss: another β for every prompt, and
  at every step of training. With k1 in the reward it does not change the fixed point, because all advantages are 0 there.
* **Divergences other than reverse KL** are scaled to the same curvature at π = π_ref. χ² may give a completion probability 0
  exactly, and total variation has its optima in corners: neither has a fixed point that a softmax reaches, so they have no row.
* **CRD with a moving old** tilts again each time old reaches θ: π_ref exp(n r/β) after n times. If old is always
  θ, or without any anchor, it converges to a single completion, not always the best.
* **CRD with Δ squared token by token** would be token-wise too (`enumerable_updates.py` has its exact update). Its group mean
  compares token j of one text with token j of another, and recipes with it are rejected.
"""
