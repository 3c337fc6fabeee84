"""Micro-batches hold whole groups if they fit. Only otherwise do statistics take a pass of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from difrl.core import CentredRewardDistillation, Clipped, Likelihoods, RatioNormalised
from difrl.data.rollout import Rollout
from difrl.policies.base import Decisions
from difrl.training.microbatches import Extent, chunks, extent, self_contained
from tests.fakes import LinearPolicy, linear_trainer

GROUPED, SUMS = CentredRewardDistillation(), CentredRewardDistillation(decisions="sum")


@pytest.mark.parametrize(
    ("objective", "size", "expected"),
    [
        (Clipped(), 3, Extent(1, 3)),  # of four decisions
        (Clipped(), 14, Extent(3, 4)),
        (Clipped(decisions="mean"), 3, Extent(1, 4)),
        (GROUPED, 14, Extent(3, 4)),
        (GROUPED, 20, Extent(3, 4)),  # five rows, but groups of three
        (GROUPED, 11, Extent(2, 4)),  # no group fits
        (SUMS, 24, Extent(6, 4)),
        (RatioNormalised(bias="batch"), 20, Extent(5, 4)),
    ],
    ids=str,
)
def test_extent_by_hand(objective: Any, size: int, expected: Extent) -> None:
    assert extent(objective, 4, size, 3) == expected


def test_chunks_cover_every_decision_once() -> None:
    seen = torch.zeros(5, 4, dtype=torch.int64)
    for rows, columns in chunks(torch.ones(5, 4, dtype=torch.bool), Extent(2, 3)):
        seen[rows, columns] += 1
    assert torch.equal(seen, torch.ones(5, 4, dtype=torch.int64))


def test_self_contained_by_hand() -> None:
    groups = torch.tensor([4, 4, 4, 1, 1, 1])
    assert self_contained(GROUPED, groups, Extent(3, 1))
    assert not self_contained(GROUPED, groups, Extent(2, 1))
    assert not self_contained(GROUPED, torch.tensor([4, 1, 4, 1, 4, 1]), Extent(3, 1))
    assert self_contained(Clipped(), groups, Extent(1, 1))
    assert not self_contained(RatioNormalised(bias="batch"), groups, Extent(6, 1))


class Asked(LinearPolicy):
    """A policy that records its passes: with or without gradient, and for which terms."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[bool, frozenset[str] | None]] = []

    def likelihoods(
        self, rollout: Rollout, decisions: Decisions, needs: Any = None, references: Any = None
    ) -> Likelihoods:
        self.calls.append((torch.is_grad_enabled(), needs))
        return super().likelihoods(rollout, decisions, needs, references)


@pytest.mark.parametrize(("size", "passes", "statistics"), [(1000, 1, 0), (12, 4, 0), (8, 6, 6)])
def test_statistics_are_evaluated_without_anchors_and_only_where_groups_are_split(
    size: int, passes: int, statistics: int
) -> None:
    """Four groups of three samples of four decisions."""
    policy = Asked()
    trainer = linear_trainer(policy=policy, train={"micro_batch": size})
    trainer.objective = GROUPED
    trainer.step(0)
    assert (
        policy.calls == [(False, GROUPED.needs)] * statistics + [(True, GROUPED.needs | {"divergence/base"})] * passes
    )
