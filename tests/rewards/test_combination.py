"""Tests of combinations of rewards by hand, against numpy, and by algebra."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards import Scores
from rewards.combination import mean, stack, uncertainty, weighted_sum, worst
from tests.helpers import scores

VALUES = [[1.0, 4.0, 0.0], [3.0, 4.0, 6.0]]
COMBINED: list[Callable[[Scores], Scores]] = [
    mean,
    worst,
    partial(uncertainty, penalty=0.5),
    partial(weighted_sum, weights=[1.0, 1.0]),
]


def test_by_hand() -> None:
    """The variances divide by K. They are 1, 0 and 9."""
    assert mean(scores(VALUES)).values.tolist() == [2.0, 4.0, 3.0]
    assert worst(scores(VALUES)).values.tolist() == [1.0, 4.0, 0.0]
    assert uncertainty(scores(VALUES), penalty=0.5).values.tolist() == [1.5, 4.0, -1.5]
    assert weighted_sum(scores(VALUES), [2.0, -1.0]).values.tolist() == [-1.0, 4.0, -6.0]


def test_members_are_stacked() -> None:
    rows = [Scores(torch.tensor([1.0, 2.0]), torch.tensor([True, False])), Scores(torch.zeros(2), torch.ones(2).bool())]
    found = stack(rows)
    assert found.values.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert found.valid.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("combine", COMBINED)
def test_row_that_one_member_cannot_score_is_not_valid(combine: Callable[[Scores], Scores]) -> None:
    found = combine(scores(VALUES, invalid=[(1, 0)]))
    assert found.valid.tolist() == [False, True, True]
    assert found.values[0] == 0
    assert found.values[1:].tolist() == combine(scores(VALUES)).values[1:].tolist()


def test_a_member_of_weight_0_does_not_count_even_if_it_is_invalid() -> None:
    found = weighted_sum(scores(VALUES, invalid=[(1, 0)]), [2.0, 0.0])
    assert found.valid.all()
    assert found.values.tolist() == [2.0, 8.0, 0.0]


tables = st.integers(1, 5).flatmap(
    lambda k: st.lists(st.lists(st.floats(-9, 9), min_size=3, max_size=3), min_size=k, max_size=k)
)


@given(tables, st.floats(0, 3))
def test_conservative_ones_are_below_the_mean_and_equal_where_members_agree(table: Any, penalty: float) -> None:
    m = scores(table)
    average, careful, pessimistic = mean(m).values, uncertainty(m, penalty=penalty).values, worst(m).values
    assert (careful <= average + 1e-12).all()
    assert (pessimistic <= average + 1e-12).all()
    torch.testing.assert_close(uncertainty(m, penalty=0.0).values, average)
    agreed = m.values.amax(0) == m.values.amin(0)
    torch.testing.assert_close(careful[agreed], pessimistic[agreed])
    expected = np.mean(table, axis=0) - penalty * np.var(table, axis=0)
    np.testing.assert_allclose(careful, expected, atol=1e-9)


@given(tables, st.floats(0, 3))
def test_a_shared_shift_passes_through(table: Any, penalty: float) -> None:
    m = scores(table)
    moved = Scores(m.values + 2.5, m.valid)
    for combine in (mean, worst, partial(uncertainty, penalty=penalty)):
        torch.testing.assert_close(combine(moved).values, combine(m).values + 2.5)


@pytest.mark.parametrize("combine", COMBINED)
def test_nan_in_a_valid_row_is_refused(combine: Callable[[Scores], Scores]) -> None:
    broken = scores(VALUES)
    broken.values[1, 2] = torch.nan
    with pytest.raises(ValueError, match="member 1 scores row 2 nan but marks it valid"):
        combine(broken)


def test_errors() -> None:
    with pytest.raises(ValueError, match="nothing to combine"):
        stack([])
    with pytest.raises(ValueError, match="3 weights for 2 members"):
        weighted_sum(scores(VALUES), [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"expected \[K, B\]"):
        worst(scores([1.0, 2.0]))
    with pytest.raises(ValueError, match="penalty is -1"):
        uncertainty(scores(VALUES), penalty=-1.0)
