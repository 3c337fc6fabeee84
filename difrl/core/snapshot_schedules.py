"""Decay schedules for averages of past weights other than the exponential one.

A snapshot moves by snapshot <- d(n) snapshot + (1 - d(n)) theta once a step, where n = 0, 1, ... counts steps. So d
alone determines the average of theta's past that it holds, and n alone is needed to resume it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from difrl.core.schedules import Coefficient


@dataclass(frozen=True)
class InUpdates(Coefficient):
    """A decay whose schedule counts optimizer updates; a step has `per_step` of them.

    d(n) = inner((n + 1) per_step). The argument is the number of updates made when the snapshot moves, after step n, as
    in the code of CRD (2603.14128) and DiffusionNFT (2509.16117). Skipped updates are counted too.
    """

    inner: Coefficient
    per_step: int

    def value(self, step: int) -> float:
        return self.inner.value((step + 1) * self.per_step)


@dataclass(frozen=True)
class Average(Coefficient):
    """An exponential average of the weights that follows fast at first, as Flow-GRPO (2505.05470) evaluates and saves it.

    Of the updates n = 1, 2, ... it moves after those where n + 1 is a multiple of `every`, with the decay

        min((1 + n) / (10 + n), decay)

    A step has `per_step` updates. Snapshots move after a step, with the product of the decays of its updates.
    """

    decay: float
    every: int = 1
    per_step: int = 1

    def value(self, step: int) -> float:
        updates = range(step * self.per_step + 1, (step + 1) * self.per_step + 1)
        return math.prod(min((1 + n) / (10 + n), self.decay) for n in updates if (n + 1) % self.every == 0)


@dataclass(frozen=True)
class Periodic(Coefficient):
    """A decay with which the snapshot moves after every `every` steps."""

    every: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}, expected at least 1 step")


@dataclass(frozen=True)
class Soup(Periodic):
    """The uniform average of the weights at the start and after every `every` steps (model soups, 2203.05482).

    d = 1 - 1 / (m + 1) after step m every, m = 1, 2, ..., and 1 otherwise. As an anchor this is that of SALSA
    (2411.01798), with checkpoints of the run in place of independently fine-tuned models.
    """

    def value(self, step: int) -> float:
        count, rest = divmod(step + 1, self.every)
        return 1.0 if rest else 1.0 - 1.0 / (count + 1)


@dataclass(frozen=True)
class Reset(Periodic):
    """The weights after the latest multiple of `every` steps: a reference that is reset regularly (ProRL, 2505.24864).

    d = 0 after step m every, m = 1, 2, ..., and 1 otherwise.
    """

    def value(self, step: int) -> float:
        return 1.0 if (step + 1) % self.every else 0.0
