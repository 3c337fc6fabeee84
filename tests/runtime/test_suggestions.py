from __future__ import annotations

from difrl.runtime.suggestions import did_you_mean


def test_nearest_word_in_its_form() -> None:
    known = {"rollout": 1, "rewards": 2}
    assert did_you_mean("rolout", known) == "did you mean rollout? "
    assert did_you_mean("reward", known, "; did you mean '{}'?") == "; did you mean 'rewards'?"


def test_nothing_near_and_no_text() -> None:
    assert did_you_mean("zzz", ["rollout"]) == did_you_mean(3, ["3"]) == did_you_mean("a", []) == ""
