"""Adaptive guidance (2312.12487): a blend of two outputs drops its second evaluation once the two agree.

Classifier-free guidance blends the conditional output with the negative one, RLG the tuned one with the base. In both
the first of the two is the main output, which remains. Guidance of a sample ends at the first step at which

    cos(main, reference) = <main, reference> / (|main| |reference|) >= threshold,

over all dimensions of the sample's raw outputs. That step is still blended, because both outputs are there; later steps
take the main output alone. The omitted term is (w - 1)(main - reference), of relative size |w - 1| sqrt(2 (1 - cos))
where both outputs have the same length: 14 % of the output for each unit of w - 1 at 0.99. With a threshold above 1
guidance never ends.

The paper compares the network's own predictions, which are noise for its models. For flow matching they are velocities.
The noise that a velocity implies, x + (1-t) v, is x itself at t = 1 for every model, so comparing it would end guidance
at the first step.

A tuned model is often closest to its base at the noisy end. The threshold 0.99, which was found for prompts, can then
end RLG at the first step: take a higher threshold for RLG, and check how many evaluations it saves (docs/inference.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.grid import Grid
from samplers.guidance import (
    Blend,
    Condition,
    Denoiser,
    PerSample,
    extrapolate,
    get_rows,
    grow,
    switch_after_steps,
    with_negatives,
)
from samplers.process import at_least_float32


class Agreement:
    """The samples of a run whose guidance has ended, and the number of evaluations that this saved.

    A sample with a larger t than at its last call has begun another run, and its guidance starts again.
    """

    def __init__(self, threshold: float, cost: int = 1) -> None:
        """Set the threshold of the cosine, and the cost of one reference output: 2 evaluations if it is itself guided."""
        self.threshold, self.cost = threshold, cost
        self.saved = PerSample()
        self._stopped = torch.zeros(0, dtype=torch.bool)
        self._last = torch.zeros(0, dtype=torch.float64)

    def active(self, rows: Tensor, t: Tensor) -> Tensor:
        """Return the positions in `rows` [B], at times t [B], that are still guided. Count the savings of the others."""
        self._stopped, self._last = grow(self._stopped, rows, False), grow(self._last, rows, -1.0)
        self._stopped[rows] &= t.double() <= self._last[rows]
        self._last[rows] = t.double()
        stopped = self._stopped[rows]
        self.saved.add(rows[stopped], float(self.cost))
        return (~stopped).nonzero().flatten()

    def compare(self, rows: Tensor, main: Tensor, reference: Tensor) -> None:
        """End guidance for the rows of `rows` [B] whose outputs [B,...] agree."""
        # In float64: the sum over a latent of 65,000 numbers must not decide by its rounding.
        cosine = torch.cosine_similarity(main.double().flatten(1), reference.double().flatten(1))
        self._stopped[rows] = cosine >= self.threshold


def adaptive_classifier_free(
    denoiser: Denoiser, scale: float, agreement: Agreement, blend: Blend = extrapolate
) -> Denoiser:
    """Return `classifier_free` without the negative prompts of samples whose two outputs agree."""
    if scale == 1:
        return denoiser

    def guided(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        condition, rows = condition.numbered(), get_rows(condition)
        active = agreement.active(rows, t)
        both = condition.doubled if len(active) == len(rows) else with_negatives(condition, active)
        outputs = at_least_float32(denoiser(torch.cat([x_t[active], x_t]), torch.cat([t[active], t]), both))
        return _blended(outputs[len(active) :], outputs[: len(active)], scale, rows, active, agreement, blend)

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
    """Return `reinforcement_learning` without the base model for samples on which it agrees with the tuned one.

    These continue at w = 1. At w = 0 and w = 1 there is only one evaluation a step in the first place.
    """
    if weight == 1:
        return tuned

    def blended(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        condition, rows = condition.numbered(), get_rows(condition)
        active = agreement.active(rows, t)
        main = at_least_float32(tuned(x_t, t, condition))
        if len(active) == 0:
            return main
        reference = at_least_float32(base(x_t[active], t[active], condition.select(active)))
        return _blended(main, reference, weight, rows, active, agreement)

    return switch_after_steps(tuned, base if weight == 0 else blended, first_steps, grid)


def _blended(
    main: Tensor,
    reference: Tensor,
    weight: float,
    rows: Tensor,
    active: Tensor,
    agreement: Agreement,
    blend: Blend = extrapolate,
) -> Tensor:
    """Return main [B,...], blended with a reference [A,...] at the positions `active` [A]."""
    some = main[active]
    agreement.compare(rows[active], some, reference)
    return main.index_copy(0, active, blend(reference, some, weight))
