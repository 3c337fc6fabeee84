"""Decays of averages, soups and resets: by hand, and as averages of the weights after each step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difrl.core import Average, Coefficient, InUpdates, Linear, Reset, Soup


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


def test_an_average_follows_fast_at_first() -> None:
    """By hand: after update 1 the decay is 2/11, after update 2 3/12; from update 890 on it is 0.99."""
    assert Average(0.99).value(0) == pytest.approx(2 / 11)
    assert Average(0.99).value(1) == pytest.approx(3 / 12)
    assert Average(0.99).value(2000) == 0.99
    assert Average(0.2).value(1) == 0.2
    assert Average(0.99, per_step=2).value(0) == pytest.approx(2 / 11 * 3 / 12)


@given(st.floats(0.0, 0.999), st.integers(1, 9), st.integers(1, 5), st.integers(0, 60))
def test_an_average_is_that_of_the_flow_grpo_authors(decay: float, every: int, per_step: int, steps: int) -> None:
    """Their loop over updates, for weights that change only with a step."""
    averaged = theta = 1.0
    schedule, found, n = Average(decay, every, per_step), 1.0, 0
    for step in range(steps):
        theta = float((step * 7) % 5)
        for _ in range(per_step):
            n += 1
            if (n + 1) % every == 0:
                averaged += (1 - min((1 + n) / (10 + n), decay)) * (theta - averaged)
        kept = schedule.value(step)
        found = kept * found + (1 - kept) * theta
    assert found == pytest.approx(averaged, abs=1e-9)
