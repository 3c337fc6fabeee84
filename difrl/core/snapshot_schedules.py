"""Decays that make something other than an exponential average of a snapshot.

A snapshot goes snapshot <- d(n) snapshot + (1 - d(n)) theta once a step, n = 0, 1, ... counting steps. So which
average of theta's past it holds is a matter of d alone, and what it needs to go on after a pause is n alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from difrl.core.schedules import Coefficient


@dataclass(frozen=True)
class InUpdates(Coefficient):
    """A decay whose schedule counts optimizer updates, of which a step makes `per_step`.

    d(n) = inner((n + 1) per_step): the argument is the number of updates made when the snapshot moves, after step n,
    as the authors of CRD (2603.14128) and DiffusionNFT (2509.16117) count; updates that were skipped are counted too.
    """

    inner: Coefficient
    per_step: int

    def value(self, step: int) -> float:
        return self.inner.value((step + 1) * self.per_step)


@dataclass(frozen=True)
class Soup(Coefficient):
    """The uniform average of the weights at the start and after every `every` steps (model soups, 2203.05482).

    d = 1 - 1 / (m + 1) after step m every, m = 1, 2, ..., and 1 otherwise. As an anchor this is SALSA's
    (2411.01798) with checkpoints of the run in place of its independently fine-tuned models.
    """

    every: int

    def __post_init__(self) -> None:
        _check(self.every)

    def value(self, step: int) -> float:
        count, rest = divmod(step + 1, self.every)
        return 1.0 if rest else 1.0 - 1.0 / (count + 1)


@dataclass(frozen=True)
class Reset(Coefficient):
    """The weights after the latest multiple of `every` steps: a reference that is reset to them (ProRL, 2505.24864).

    d = 0 after step m every, m = 1, 2, ..., and 1 otherwise.
    """

    every: int

    def __post_init__(self) -> None:
        _check(self.every)

    def value(self, step: int) -> float:
        return 1.0 if (step + 1) % self.every else 0.0


def _check(every: int) -> None:
    if every < 1:
        raise ValueError(f"every is {every}, expected at least 1 step")
