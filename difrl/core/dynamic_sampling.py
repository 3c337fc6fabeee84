"""The stage between rollout and advantages: it selects the scored samples of a training step.

A stage receives a function that draws samples, and returns those to train on. `draw_once` is the empty stage. The caller's
function sees every record that it draws, so discarded samples are counted there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from torch import Tensor

from difrl.core.advantages import informative


class ScoredSamples(Protocol):
    """A record of B scored samples."""

    @property
    def rewards(self) -> Tensor:
        """[B]."""

    @property
    def groups(self) -> Tensor:
        """[B] int64 ids, whole groups."""

    @property
    def valid(self) -> Tensor:
        """[B] bool."""

    def select(self, index: Tensor) -> Self:
        """Return the rows of a bool mask [B], in order."""

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Concatenate the rows of the parts in order."""


S = TypeVar("S", bound=ScoredSamples)
Draw = Callable[[int, Sequence[int] | None], S]
"""draw(k, groups) -> fresh samples of these groups (None: of all), for the k-th time."""
Collect = Callable[[Draw[S]], S]


def draw_once(draw: Draw[S]) -> S:
    """Return the first draw, whatever it holds."""
    return draw(0, None)


def total_reward(record: ScoredSamples) -> tuple[Tensor, Tensor]:
    """Return the rewards that training uses, [B], and their validity, bool [B]."""
    return record.rewards, record.valid


@dataclass(frozen=True)
class DynamicSampling(Generic[S]):
    """Draw a group again until its rewards differ: dynamic sampling (DAPO, 2503.14476).

    Each group is drawn independently, at most `max_draws` times, and its last draw is kept (if the rewards that training
    uses are equal there too, its advantages are 0). So the number of samples of a step does not depend on chance, no
    informative group is discarded, and groups do not depend on each other: processes that hold different groups need no
    communication, and get the groups that a single process would. DAPO instead draws whole batches and keeps the first
    informative groups.

    Attributes:
      max_draws: maximum number of draws of a group.
      values: function from a record to the rewards that should differ, [B], and their validity, bool [B]. They may be one
        part of the total. In DAPO a group is selected by its correct answers, while training also uses a penalty on
        length. A part may be missing in valid rows, therefore it has its own validity.
    """

    max_draws: int
    values: Callable[[S], tuple[Tensor, Tensor]] = total_reward

    def __post_init__(self) -> None:
        if self.max_draws < 1:
            raise ValueError(f"max_draws is {self.max_draws}, expected at least 1")

    def __call__(self, draw: Draw[S]) -> S:
        record = draw(0, None)
        for k in range(1, self.max_draws):
            values, valid = self.values(record)
            differs = informative(values, record.groups, valid)
            if differs.all():
                break
            again = list(dict.fromkeys(record.groups[~differs].tolist()))
            fresh = draw(k, again)
            found = list(dict.fromkeys(fresh.groups.tolist()))
            if sorted(found) != sorted(again):
                raise ValueError(
                    f"draw {k} returned groups {found}, expected {again}; a group keeps its id when it is drawn again"
                )
            record = record.cat([record.select(differs), fresh])
        return record
