"""Adaptive guidance, 2312.12487: a blend of two outputs loses its second evaluation once the two agree.

Classifier-free guidance blends the conditional output with the negative one, RLG the tuned with the base. In
either the first of the two is the one that stays. A sample stops by itself, at the first step at which

    cos(main, reference) = <main, reference> / (|main| |reference|) >= threshold,

over all dimensions of its raw outputs; that step is still blended (it is paid for), those after it are the main
output alone. What is left out is (w - 1)(main - reference), of relative size |w - 1| sqrt(2 (1 - cos)) where both
outputs are of one length: 14 % of the output for each unit of w - 1 at 0.99. A threshold above 1 never stops.

The paper compares the network's own predictions, the noise for its models. For flow matching these are velocities;
the noise that a velocity implies, x + (1-t) v, is x itself at t = 1 whatever the model says, and would stop every
sample at its first step.

A tuned model is often closest to its base at the noisy end, so that 0.99, made for prompts, can end RLG at the first
step: take a higher threshold for RLG, and look at how many evaluations it saved (docs/inference.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.grid import Grid
from samplers.guidance import Condition, Denoiser, PerSample, rows_of, switched, with_negatives
from samplers.process import raised


class Agreement:
    """Which samples of a run have stopped, and the evaluations this saved.

    A sample that is seen at a later time (a larger t) than before has begun another run, and starts afresh.
    """

    def __init__(self, threshold: float, cost: int = 1) -> None:
        """cost: evaluations of a sample that one evaluation of the reference stands for, 2 if itself under guidance."""
        self.threshold, self.cost = threshold, cost
        self.saved = PerSample()
        self._stopped = torch.zeros(0, dtype=torch.bool)
        self._last = torch.zeros(0, dtype=torch.float64)

    def active(self, rows: Tensor, t: Tensor) -> Tensor:
        """The positions in `rows` [B], seen at t [B], that have not stopped; what the others save is counted."""
        self._grow(rows)
        self._stopped[rows] &= t.double() <= self._last[rows]
        self._last[rows] = t.double()
        stopped = self._stopped[rows]
        self.saved.add(rows[stopped], float(self.cost))
        return (~stopped).nonzero().flatten()

    def compare(self, rows: Tensor, main: Tensor, reference: Tensor) -> None:
        """Stops those of `rows` [B] whose outputs [B,...] agree."""
        # In float64: the sum over a latent of 65,000 numbers must not decide by its rounding.
        cosine = torch.cosine_similarity(main.double().flatten(1), reference.double().flatten(1))
        self._stopped[rows] = cosine >= self.threshold

    def _grow(self, rows: Tensor) -> None:
        missing = int(rows.max()) + 1 - len(self._stopped) if len(rows) else 0
        if missing > 0:
            self._stopped = torch.cat([self._stopped.to(rows.device), rows.new_zeros(missing, dtype=torch.bool)])
            self._last = torch.cat([self._last.to(rows.device), torch.full((missing,), -1.0).to(rows.device)]).double()


def adaptive_classifier_free(denoiser: Denoiser, scale: float, agreement: Agreement) -> Denoiser:
    """`classifier_free` that leaves out the negative prompts of samples whose two outputs agree."""
    if scale == 1:
        return denoiser

    def guided(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if condition.negative is None:
            raise ValueError(
                f"classifier-free guidance at scale {scale} needs the condition's `negative`, the tensors of "
                "the negative or empty prompt; give it, or use scale 1"
            )
        condition, rows = condition.numbered(), rows_of(condition)
        active = agreement.active(rows, t)
        both = with_negatives(condition, active)
        outputs = raised(denoiser(torch.cat([x_t[active], x_t]), torch.cat([t[active], t]), both))
        return _blended(outputs[len(active) :], outputs[: len(active)], scale, rows, active, agreement)

    return guided


def adaptive_reinforcement_learning(
    base: Denoiser,
    tuned: Denoiser,
    weight: float,
    agreement: Agreement,
    *,
    first_steps: int = 0,
    grid: Grid | None = None,
) -> Denoiser:
    """`reinforcement_learning` that leaves out the base model of samples on which it and the tuned one agree.

    What stays is w = 1. At w = 0 and w = 1 there is one evaluation to begin with.
    """
    if weight == 1:
        return tuned

    def blended(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        condition, rows = condition.numbered(), rows_of(condition)
        active = agreement.active(rows, t)
        main = raised(tuned(x_t, t, condition))
        if len(active) == 0:
            return main
        reference = raised(base(x_t[active], t[active], condition.select(active)))
        return _blended(main, reference, weight, rows, active, agreement)

    return switched(tuned, base if weight == 0 else blended, first_steps, grid)


def _blended(
    main: Tensor, reference: Tensor, weight: float, rows: Tensor, active: Tensor, agreement: Agreement
) -> Tensor:
    """main [B,...], but reference + weight (main - reference) at the `active` positions, which the reference has."""
    some = main[active]
    agreement.compare(rows[active], some, reference)
    return main.index_copy(0, active, reference + weight * (some - reference))
