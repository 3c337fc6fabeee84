"""Between rollout and advantages: which scored samples a step learns from.

A stage is given a way to draw and returns what to train on. `once` is the empty stage. The caller's draw sees
every record, so what a stage discards is counted there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
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
Draw = Callable[[int], S]
Collect = Callable[[Draw[S]], S]


def once(draw: Draw[S]) -> S:
    """draw(0), whatever it holds."""
    return draw(0)


def _alone(enough: bool) -> bool:
    return enough


@dataclass(frozen=True)
class Informative:
    """Draws until `groups` groups are informative: DAPO's dynamic sampling (2503.14476).

    Returns exactly `groups` groups, the informative ones first drawn; if max_draws did not bring enough,
    uninformative ones fill up (their advantages are 0), so that the shape of a step does not depend on luck;
    fewer only where fewer were drawn at all.

    Attributes:
      groups: how many to return.
      max_draws: how often to draw at most.
      agree: whether all processes have enough, from whether this one has: a logical-and over processes, for
        draws in which they take part together.
    """

    groups: int
    max_draws: int
    agree: Callable[[bool], bool] = _alone

    def __post_init__(self) -> None:
        if self.groups < 1 or self.max_draws < 1:
            raise ValueError(f"groups is {self.groups} and max_draws {self.max_draws}, expected at least 1 of each")

    def __call__(self, draw: Draw[S]) -> S:
        """draw(k) is the k-th fresh record; its group ids must not have been drawn before."""
        record = draw(0)
        for k in range(1, self.max_draws):
            if self.agree(len(_useful(record)) >= self.groups):
                break
            record = _joined(record, draw(k), k)
        useful = _useful(record)
        first = list(dict.fromkeys(useful + _ordered(record.groups)))
        kept = torch.tensor(first[: self.groups], dtype=torch.int64, device=record.groups.device)
        return record.select(torch.isin(record.groups, kept))


def _useful(record: Scored) -> list[int]:
    return _ordered(record.groups[informative(record.rewards, record.groups, record.valid)])


def _ordered(groups: Tensor) -> list[int]:
    return list(dict.fromkeys(groups.tolist()))


def _joined(record: S, fresh: S, k: int) -> S:
    again = torch.isin(fresh.groups, record.groups)
    if again.any():
        found = sorted(set(fresh.groups[again].tolist()))
        raise ValueError(
            f"draw {k} returned groups {found} of an earlier draw, expected new ids; number groups by draw, "
            "or samples of different draws would form one group"
        )
    return record.cat([record, fresh])
