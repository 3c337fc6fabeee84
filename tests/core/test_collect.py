"""The stage between rollout and advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from difrl.core import Informative, once


@dataclass
class Record:
    rewards: Tensor
    groups: Tensor
    valid: Tensor
    payload: list[str]

    def select(self, index: Tensor) -> Record:
        kept = [word for word, keep in zip(self.payload, index.tolist(), strict=True) if keep]
        return Record(self.rewards[index], self.groups[index], self.valid[index], kept)

    @classmethod
    def cat(cls, parts: Sequence[Record]) -> Record:
        tensors = [torch.cat([getattr(p, n) for p in parts]) for n in ("rewards", "groups", "valid")]
        return cls(*tensors, [word for p in parts for word in p.payload])


def source(*draws: str) -> tuple[Callable[[int], Record], list[int]]:
    """Draws written as "01 1?": groups of 0/1 rewards, "?" unscored; and a list of the draws made."""
    made: list[int] = []

    def draw(k: int) -> Record:
        made.append(k)
        words = draws[k].split()
        rows = [(100 * k + i, letter, word) for i, word in enumerate(words) for letter in word]
        rewards = torch.tensor([float(letter.replace("?", "nan")) for _, letter, _ in rows])
        groups = torch.tensor([group for group, _, _ in rows])
        return Record(rewards, groups, ~rewards.isnan(), [word for _, _, word in rows])

    return draw, made


def words(record: Record) -> list[str]:
    return [record.payload[i] for i in range(0, len(record.payload), 2)]


def test_once_draws_once() -> None:
    draw, made = source("00 11")
    assert words(once(draw)) == ["00", "11"]
    assert made == [0]


def test_draws_stop_as_soon_as_there_are_enough() -> None:
    draw, made = source("00 01 11", "10 1? 01", "01 01 01")
    assert words(Informative(groups=2, max_draws=3)(draw)) == ["01", "10"]
    assert made == [0, 1]


def test_uninformative_groups_fill_up_when_draws_run_out() -> None:
    draw, made = source("00 01 1?", "11 00 10")
    found = Informative(groups=3, max_draws=2)(draw)
    assert words(found) == ["00", "01", "10"]
    assert found.groups.tolist() == [0, 0, 1, 1, 102, 102]
    assert made == [0, 1]


def test_fewer_groups_only_where_fewer_were_drawn() -> None:
    draw, _ = source("00 01")
    assert words(Informative(groups=5, max_draws=1)(draw)) == ["00", "01"]


def test_all_processes_must_have_enough() -> None:
    draw, made = source("01 01", "01 01", "01 01")
    answers = iter([False, True])
    asked: list[bool] = []

    def agree(enough: bool) -> bool:
        asked.append(enough)
        return next(answers)

    assert len(words(Informative(groups=2, max_draws=9, agree=agree)(draw))) == 2
    assert made == [0, 1]
    assert asked == [True, True]


def test_group_ids_may_not_come_again() -> None:
    draw, _ = source("00 11")
    with pytest.raises(ValueError, match=r"draw 1 returned groups \[0, 1\] of an earlier draw"):
        Informative(groups=1, max_draws=2)(lambda k: draw(0))


def test_errors() -> None:
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        Informative(groups=0, max_draws=1)
