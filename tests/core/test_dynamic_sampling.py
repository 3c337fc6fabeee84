"""Dynamic sampling: the groups that are drawn again, and the samples that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from difrl.core import DynamicSampling, draw_once

Draw = Callable[[int, Sequence[int] | None], "Record"]


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


def record(words: dict[int, str]) -> Record:
    rows = [(group, letter, word) for group, word in words.items() for letter in word]
    rewards = torch.tensor([float(letter.replace("?", "nan")) for _, letter, _ in rows])
    groups = torch.tensor([group for group, _, _ in rows])
    return Record(rewards, groups, ~rewards.isnan(), [word for _, _, word in rows])


def source(*draws: str) -> tuple[Draw, list[Sequence[int] | None]]:
    """Return a function with these draws of groups 0, 1, … ("01 1?": 0/1 rewards, "?" unscored), and a log of its arguments."""
    requested: list[Sequence[int] | None] = []

    def draw(k: int, groups: Sequence[int] | None) -> Record:
        assert k == len(requested)
        requested.append(groups)
        words = draws[k].split()
        return record({g: words[g] for g in (range(len(words)) if groups is None else groups)})

    return draw, requested


def words(found: Record) -> dict[int, str]:
    return dict(zip(found.groups.tolist(), found.payload, strict=True))


def test_draw_once() -> None:
    draw, requested = source("00 11")
    assert words(draw_once(draw)) == {0: "00", 1: "11"}
    assert requested == [None]


def test_only_uninformative_groups_are_drawn_again() -> None:
    draw, requested = source("00 01 11", "10 -- 1?", "-- -- 01", "-- -- --")
    assert words(DynamicSampling(max_draws=4)(draw)) == {0: "10", 1: "01", 2: "01"}
    assert requested == [None, [0, 2], [2]]


def test_the_last_draw_is_kept() -> None:
    draw, requested = source("00 01 1?", "11 -- 10")
    found = DynamicSampling(max_draws=2)(draw)
    assert words(found) == {0: "11", 1: "01", 2: "10"}
    assert sorted(found.groups.tolist()) == [0, 0, 1, 1, 2, 2]
    assert requested == [None, [0, 2]]


def test_groups_may_have_to_differ_in_other_values() -> None:
    """Group 1 differs in its rewards and not in `values`, group 2 the other way round."""
    values = {"01": [0.0, 0.0], "11": [0.0, 1.0]}
    draw, requested = source("01 01 11", "11 11 --")

    def values_of(record: Record) -> tuple[Tensor, Tensor]:
        return torch.tensor([v for w in record.payload[::2] for v in values[w]]), record.valid

    found = DynamicSampling(2, values_of)(draw)
    assert words(found) == {0: "11", 1: "11", 2: "11"}
    assert requested == [None, [0, 1]]


def test_values_may_be_missing_in_valid_rows() -> None:
    """Group 0 differs in the values of its valid rows, group 1 has one value left, group 2 none."""
    values = {0: [0.0, 1.0], 1: [0.0, torch.nan], 2: [torch.nan, torch.nan]}
    draw, requested = source("11 11 11", "-- 11 11")

    def values_of(record: Record) -> tuple[Tensor, Tensor]:
        found = torch.tensor([v for group in record.groups.tolist()[::2] for v in values[group]])
        return found, ~found.isnan()

    assert DynamicSampling(2, values_of)(draw).valid.all()
    assert requested == [None, [1, 2]]


def test_groups_are_independent_of_each_other() -> None:
    """Therefore several processes get the groups that one process gets."""
    draws = ("00 01 11", "10 -- 11", "-- -- 01")
    together = words(DynamicSampling(max_draws=3)(source(*draws)[0]))
    for group in range(3):
        alone = DynamicSampling(max_draws=3)(lambda k, _, g=group: record({g: draws[k].split()[g]}))
        assert words(alone) == {group: together[group]}


def test_other_groups_than_requested_are_refused() -> None:
    draw, _ = source("00 11 01")
    with pytest.raises(ValueError, match=r"draw 1 returned groups \[0, 1, 2\], expected \[0, 1\]"):
        DynamicSampling(max_draws=2)(lambda k, groups: draw(0, None) if k == 0 else record({0: "01", 1: "01", 2: "01"}))


def test_errors() -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        DynamicSampling(max_draws=0)
