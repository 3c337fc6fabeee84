"""The best weight of a sweep, with examples by hand."""

from __future__ import annotations

import math

import pytest

from difrl.reporting.sweep_peaks import argmax_known, best_weight_index, watched_series

SERIES = {
    "weights": [0.0, 1.0, 2.0],
    "reward/geneval": [0.1, 0.2, 0.9],
    "watch/judge": [0.2, 0.6, 0.4],
    "watch/judge/stderr": [0.9, 0.1, 0.1],
    "watch/unknown": [None, None, None],
}


def test_argmax_is_the_first_of_the_highest() -> None:
    assert argmax_known([0.1, 0.3, 0.3]) == 1
    assert argmax_known([None, math.nan, -2.0, math.inf]) == 2
    assert argmax_known([None, None]) is None
    assert argmax_known([]) is None


def test_watched_rewards_decide_the_best_weight() -> None:
    """The trained reward and rewards that could not be measured do not count."""
    assert list(watched_series(SERIES)) == ["judge"]
    assert best_weight_index(SERIES) == 1


def test_watched_rewards_of_different_scales_count_the_same() -> None:
    """Scaled: judge 0, 1, 1/2; ocr 0.8, 0, 1: means 0.4, 0.5, 0.75. Without scaling the first would win."""
    assert best_weight_index({**SERIES, "watch/ocr": [180.0, 100.0, 200.0]}) == 2
    assert best_weight_index({**SERIES, "watch/ocr": [180.0, 100.0, 100.0]}) == 0  # 0.5, 0.5, 0.25: the first of equals
    # A weight without one of the rewards is never the best; a constant reward does not count.
    assert best_weight_index({**SERIES, "watch/ocr": [100.0, 180.0, None]}) == 1
    assert best_weight_index({**SERIES, "watch/constant": [7.0, 7.0, 7.0]}) == 1


def test_without_a_watched_reward_there_is_no_best() -> None:
    with pytest.raises(ValueError, match="add one"):
        best_weight_index({"weights": [0.0], "reward/geneval": [0.4]})
    with pytest.raises(ValueError, match="choose one yourself"):
        best_weight_index({"watch/a": [1.0, None], "watch/b": [None, 1.0]})
