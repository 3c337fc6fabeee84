"""The order in which prompts are trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from difrl.data.prompts import Prompt
from samplers.noise import stable_seed


class PromptOrder:
    """The prompts of each step: a function of seed and step alone, so that resuming needs nothing else.

    With equal weights a run walks through one shuffled epoch after the other, across step boundaries: after
    E epochs every prompt was trained on E times. Where a step holds the end of one epoch and the beginning of
    the next, the beginning leaves out what the end has, so that no prompt is twice in a step (unless a step
    is larger than the set).

    With unequal weights each step is drawn on its own, without replacement, and a prompt is in it with
    probability per_step · weight / Σ weights (systematic sampling in a shuffled order, Madow 1949). A prompt
    whose share would be more than 1 is in every step, and the others share the rest. Where a step is larger
    than the set, prompts repeat in proportion to their weights.
    """

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int) -> None:
        if not prompts or per_step < 1:
            raise ValueError(f"{len(prompts)} prompts and {per_step} a step, expected at least one of both")
        self.count, self.per_step, self.seed = len(prompts), per_step, seed
        weights = np.array([prompt.weight for prompt in prompts], dtype=np.float64)
        self.shares = None if (weights == weights[0]).all() else _shares(weights, per_step)

    def step(self, step: int) -> list[int]:
        """Numbers of the prompts of a step, `per_step` of them."""
        if self.shares is not None:
            return self._drawn(step, self.shares)
        start = step * self.per_step
        epochs = range(start // self.count, (start + self.per_step - 1) // self.count + 1)
        walked = np.concatenate([self._epoch(epoch) for epoch in epochs])
        first = start - epochs[0] * self.count
        return [int(index) for index in walked[first : first + self.per_step]]

    def _uniform(self, use: str, number: int, count: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(stable_seed(self.seed, number, use)))
        return generator.random(count)

    def _shuffled(self, use: str, number: int) -> np.ndarray:
        # The order of uniform numbers, not Generator.permutation, whose stream numpy may change.
        return np.argsort(self._uniform(use, number, self.count), kind="stable")

    def _epoch(self, epoch: int) -> np.ndarray:
        """The order of one epoch [count].

        It depends on the epoch before it where a step spans both, and so on back to an epoch that begins
        with a step: at most per_step epochs.
        """
        first = epoch
        while self.count >= self.per_step and (first * self.count) % self.per_step:
            first -= 1
        order = self._shuffled("epoch", first)
        for number in range(first + 1, epoch + 1):
            begun = (number * self.count) % self.per_step
            following = self._shuffled("epoch", number)
            fresh = following[~np.isin(following, order[-begun:])]
            head = fresh[: self.per_step - begun]
            order = np.concatenate([head, following[~np.isin(following, head)]])
        return order

    def _drawn(self, step: int, shares: np.ndarray) -> list[int]:
        order = self._shuffled("prompts", step)
        # Points one apart fall into intervals as long as the shares: an interval is hit by its length.
        ends = np.cumsum(shares[order])
        offset = self._uniform("offset", step, 1)
        points = (offset + np.arange(self.per_step)) * (ends[-1] / self.per_step)
        hit = np.searchsorted(ends, points, side="right").clip(max=self.count - 1)
        return [int(index) for index in order[hit]]


def _shares(weights: np.ndarray, per_step: int) -> np.ndarray:
    """How often a step holds each prompt in the mean: by the weights, and at most once if that can be."""
    certain = np.zeros(len(weights), dtype=bool)
    while True:
        rest = np.where(certain, 0.0, weights)
        shares = np.where(certain, 1.0, (per_step - certain.sum()) * rest / max(rest.sum(), 1e-300))
        over = (shares > 1) & ~certain
        if per_step > len(weights) or not over.any():
            return shares
        certain |= over
