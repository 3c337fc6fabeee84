"""Schedules by hand, and the decays that published methods use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from difrl.core import Coefficient, Constant, Cosine, Linear, Schedule


def test_constant() -> None:
    assert [Constant(0.5).value(n) for n in (0, 7)] == [0.5, 0.5]
    assert [Constant(0.6, warmup=3).value(n) for n in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.6])


def test_linear_and_cosine_by_hand() -> None:
    assert [Linear(1, 3, 4).value(n) for n in range(6)] == pytest.approx([1, 1.5, 2, 2.5, 3, 3])
    assert [Cosine(1, 0, 4).value(n) for n in range(6)] == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0, 0])
    assert [Linear(1, 0, 2, warmup=2).value(n) for n in range(5)] == pytest.approx([0.5, 1, 1, 0.5, 0])


@pytest.mark.parametrize(
    ("schedule", "published"),
    [
        (Linear(0.25, 0.999, (0.999 - 0.25) / 0.005), lambda n: min(0.25 + 0.005 * n, 0.999)),
        (Linear(0, 0.999, 0.999 / 0.0075, warmup=75), lambda n: min(0.0075 * max(0, n - 75), 0.999)),
        (Linear(0, 0.5, 500), lambda n: min(0.001 * n, 0.5)),
    ],
)
def test_decays_of_crd_and_nft_are_linear_schedules(schedule: Schedule, published: Callable[[int], float]) -> None:
    for n in range(600):
        assert schedule.value(n) == pytest.approx(published(n), abs=1e-12)


def test_defaults_do_not_adapt() -> None:
    coefficient = Linear(1, 0, 10)
    assert coefficient.rows(5, torch.randn(3)).tolist() == [0.5, 0.5, 0.5]
    assert coefficient.observed(3.0) is coefficient


def test_errors() -> None:
    with pytest.raises(ValueError, match="expected steps > 0"):
        Linear(0, 1, 0)
    with pytest.raises(ValueError, match="warmup is -1"):
        Constant(1.0, warmup=-1)
    with pytest.raises(NotImplementedError, match="Coefficient must define value"):
        Coefficient().value(0)
    with pytest.raises(NotImplementedError, match="Schedule must define shape"):
        Schedule(0, 1, 1).value(0)
