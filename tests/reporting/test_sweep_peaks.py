"""Where a sweep is highest, by hand."""

from __future__ import annotations

import math

import pytest

from difrl.reporting.sweep_peaks import best, peak, watched

SERIES = {
    "weights": [0.0, 1.0, 2.0],
    "reward/geneval": [0.1, 0.2, 0.9],
    "watch/judge": [0.2, 0.6, 0.4],
    "watch/judge/stderr": [0.9, 0.1, 0.1],
    "watch/unknown": [None, None, None],
}


def test_peak_is_the_first_of_the_highest() -> None:
    assert peak([0.1, 0.3, 0.3]) == 1
    assert peak([None, math.nan, -2.0, math.inf]) == 2
    assert peak([None, None]) is None
    assert peak([]) is None


def test_the_best_weight_is_the_watched_rewards() -> None:
    """Whatever the trained one says; what could not be measured has no say."""
    assert list(watched(SERIES)) == ["judge"]
    assert best(SERIES) == 1


def test_several_watched_rewards_count_alike_whatever_their_scale() -> None:
    """Scaled: judge 0, 1, 1/2; ocr 0.8, 0, 1: means 0.4, 0.5, 0.75. Without scaling the first would win."""
    assert best({**SERIES, "watch/ocr": [180.0, 100.0, 200.0]}) == 2
    assert best({**SERIES, "watch/ocr": [180.0, 100.0, 100.0]}) == 0  # 0.5, 0.5, 0.25: the first of equals
    # A weight that one of them does not know is not chosen; one that never changes has no say.
    assert best({**SERIES, "watch/ocr": [100.0, 180.0, None]}) == 1
    assert best({**SERIES, "watch/constant": [7.0, 7.0, 7.0]}) == 1


def test_without_a_watched_reward_there_is_no_best() -> None:
    with pytest.raises(ValueError, match="name one"):
        best({"weights": [0.0], "reward/geneval": [0.4]})
    with pytest.raises(ValueError, match="choose one yourself"):
        best({"watch/a": [1.0, None], "watch/b": [None, 1.0]})
