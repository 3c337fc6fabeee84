"""Decays of soups and resets: by hand, and as averages of the weights after each step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difrl.core import Coefficient, InUpdates, Linear, Reset, Soup


def snapshots_along(decay: Coefficient, path: list[float]) -> list[float]:
    """Return a snapshot that begins at path[0] after each of the steps that end at path[1], path[2], ..."""
    held, found = path[0], []
    for step, theta in enumerate(path[1:]):
        held = decay.value(step) * held + (1 - decay.value(step)) * theta
        found.append(held)
    return found


def test_by_hand() -> None:
    path = [0.0, 3.0, 6.0, 9.0, 12.0]
    assert snapshots_along(Reset(2), path) == [0.0, 6.0, 6.0, 12.0]
    assert snapshots_along(Soup(2), path) == pytest.approx([0.0, 3.0, 3.0, 6.0])  # means of 0, 6 and of 0, 6, 12
    assert snapshots_along(Soup(1), path) == pytest.approx([1.5, 3.0, 4.5, 6.0])


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30), st.integers(1, 7))
def test_a_soup_is_the_mean_and_a_reset_the_latest(path: list[float], every: int) -> None:
    kept = path[::every]
    assert snapshots_along(Soup(every), path)[-1] == pytest.approx(sum(kept) / len(kept), abs=1e-9)
    assert snapshots_along(Reset(every), path)[-1] == kept[-1]


def test_schedules_in_updates() -> None:
    """Four updates a step: 4 (n + 1) of them are made when step n ends."""
    decay = InUpdates(Linear(0.0, 1.0, 16), 4)
    assert [decay.value(n) for n in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("kind", [Soup, Reset])
def test_at_least_one_step(kind: type[Soup] | type[Reset]) -> None:
    with pytest.raises(ValueError, match="every is 0, expected at least 1"):
        kind(0)
