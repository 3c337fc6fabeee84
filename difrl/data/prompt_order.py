"""The order in which a run trains on its prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from difrl.data.prompts import Prompt
from samplers.noise import stable_seed


class PromptOrder:
    """The prompts of each step, as a function of seed, step and draw alone. Resuming needs no further state.

    With equal weights a run goes through one shuffled epoch after the other, across steps: after E epochs it has trained E
    times on every prompt. A step may contain the end of one epoch and the beginning of the next. Then the beginning omits
    the prompts of the end, so that no prompt is twice in a step (unless a step is larger than the set).

    With unequal weights each step is drawn separately, without replacement, and contains a prompt with probability
    per_step · weight / Σ weights (systematic sampling in a shuffled order, Madow 1949). A prompt whose share would exceed 1
    is in every step, and the others share the rest. If a step is larger than the set, prompts repeat in proportion to
    their weights.

    Groups that a step draws again take other prompts, from a stream of their own, so that the epochs go on as if no group
    had been drawn again.
    """

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int) -> None:
        if not prompts or per_step < 1:
            raise ValueError(f"{len(prompts)} prompts and {per_step} a step, expected at least one of each")
        self.count, self.per_step, self.seed = len(prompts), per_step, seed
        weights = np.array([prompt.weight for prompt in prompts], dtype=np.float64)
        self.shares = None if (weights == weights[0]).all() else _expected_counts(weights, per_step)

    def step(self, step: int) -> list[int]:
        """Return the numbers of the `per_step` prompts of a step."""
        if self.shares is not None:
            return self._draw(step, self.shares)
        start = step * self.per_step
        epochs = range(start // self.count, (start + self.per_step - 1) // self.count + 1)
        order = np.concatenate([self._epoch(epoch) for epoch in epochs])
        first = start - epochs[0] * self.count
        return [int(index) for index in order[first : first + self.per_step]]

    def redraw(self, step: int, draw: int) -> list[int]:
        """Return the numbers of the `per_step` prompts for the groups that a step draws again: draw 1, 2, ….

        With equal weights the draws of a step go through the prompts that are not in it, and then through those that are.
        """
        if self.shares is not None:
            return self._draw(step, self.shares, f"/redraw/{draw}")
        order = self._shuffle("redraw", step)
        again = np.isin(order, self.step(step))
        order = np.concatenate([order[~again], order[again]])
        places = (np.arange(self.per_step) + (draw - 1) * self.per_step) % self.count
        return [int(index) for index in order[places]]

    def _uniform(self, purpose: str, number: int, count: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(stable_seed(self.seed, number, purpose)))
        return generator.random(count)

    def _shuffle(self, purpose: str, number: int) -> np.ndarray:
        # The order of uniform numbers; numpy may change the stream of Generator.permutation.
        return np.argsort(self._uniform(purpose, number, self.count), kind="stable")

    def _epoch(self, epoch: int) -> np.ndarray:
        """Return the order of one epoch [count].

        If a step spans this epoch and the one before, the order depends on that epoch, and so on back to an epoch that
        begins with a step. These are at most `per_step` epochs.
        """
        first = epoch
        while self.count >= self.per_step and (first * self.count) % self.per_step:
            first -= 1
        order = self._shuffle("epoch", first)
        for number in range(first + 1, epoch + 1):
            taken = (number * self.count) % self.per_step  # places of the step that the epoch before fills
            following = self._shuffle("epoch", number)
            fresh = following[~np.isin(following, order[-taken:])]
            head = fresh[: self.per_step - taken]
            order = np.concatenate([head, following[~np.isin(following, head)]])
        return order

    def _draw(self, step: int, shares: np.ndarray, draw: str = "") -> list[int]:
        order = self._shuffle(f"prompts{draw}", step)
        # Points at distance 1 fall into intervals as long as the shares, so the chance of an interval is its length.
        ends = np.cumsum(shares[order])
        offset = self._uniform(f"offset{draw}", step, 1)
        points = (offset + np.arange(self.per_step)) * (ends[-1] / self.per_step)
        hit = np.searchsorted(ends, points, side="right").clip(max=self.count - 1)
        return [int(index) for index in order[hit]]


def _expected_counts(weights: np.ndarray, per_step: int) -> np.ndarray:
    """Return how often a step contains each prompt on average: in proportion to the weights, at most once if possible."""
    certain = np.zeros(len(weights), dtype=bool)
    while True:
        rest = np.where(certain, 0.0, weights)
        shares = np.where(certain, 1.0, (per_step - certain.sum()) * rest / max(rest.sum(), 1e-300))
        over = (shares > 1) & ~certain
        if per_step > len(weights) or not over.any():
            return shares
        certain |= over
