"""Between rollout and advantages: which scored samples a step learns from.

A stage is given a way to draw and returns what to train on. `once` is the empty stage. The caller's draw sees
every record, so what a stage discards is counted there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from torch import Tensor

from difrl.core.advantages import informative


class Scored(Protocol):
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
        """The rows of a bool mask [B], in order."""

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The rows of the parts in order."""


S = TypeVar("S", bound=Scored)
Draw = Callable[[int, Sequence[int] | None], S]
"""draw(k, groups): fresh samples of these groups, for the k-th time; of all groups where groups is None."""
Collect = Callable[[Draw[S]], S]


def once(draw: Draw[S]) -> S:
    """The first draw, whatever it holds."""
    return draw(0, None)


def total(record: Scored) -> tuple[Tensor, Tensor]:
    """The rewards that are learnt from, and where they are valid."""
    return record.rewards, record.valid


@dataclass(frozen=True)
class Informative(Generic[S]):
    """Draws a group again until its rewards differ: dynamic sampling (DAPO, 2503.14476).

    Which rewards is told by `values`, of a record numbers [B] and which of them count, bool [B]: what is learnt from, or one
    of its parts (in DAPO a group counts by how many answers are right, though a punishment for length is learnt from
    besides). A part may be missing in rows that are valid, so that it says itself where it counts.

    Each group is drawn for itself, at most `max_draws` times, and the last draw stands (where what is learnt
    from does not differ either, its advantages are 0). So the shape of a step does not depend on luck, nothing informative
    is thrown away, and no group needs to know of the others: processes that hold different groups need not
    agree, and find what one process would. DAPO draws whole batches instead and keeps the first informative.
    """

    max_draws: int
    values: Callable[[S], tuple[Tensor, Tensor]] = total

    def __post_init__(self) -> None:
        if self.max_draws < 1:
            raise ValueError(f"max_draws is {self.max_draws}, expected at least 1")

    def __call__(self, draw: Draw[S]) -> S:
        record = draw(0, None)
        for k in range(1, self.max_draws):
            values, counts = self.values(record)
            good = informative(values, record.groups, counts)
            if good.all():
                break
            wanted = _ids(record.groups[~good])
            record = record.cat([record.select(good), _checked(draw(k, wanted), wanted, k)])
        return record


def _ids(groups: Tensor) -> list[int]:
    return list(dict.fromkeys(groups.tolist()))


def _checked(fresh: S, wanted: list[int], k: int) -> S:
    found = _ids(fresh.groups)
    if sorted(found) != sorted(wanted):
        raise ValueError(
            f"draw {k} returned groups {found}, expected {wanted}; a group keeps its id when it is drawn again"
        )
    return fresh
