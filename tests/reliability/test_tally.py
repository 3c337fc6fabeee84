"""A failed trial is counted by the name of its case, and does not hide the trials after it."""

from __future__ import annotations

from tests.reliability.tally import Tally


def test_a_failure_is_counted_and_does_not_end_the_trials() -> None:
    tally = Tally(full=False)
    for index in tally.trials(short=4, long=100):
        with tally.trial(f"case {index}"):
            assert index != 2
    assert (tally.tried, tally.failures) == (4, ["case 2: AssertionError: assert 2 != 2"])


def test_the_long_form_has_more_trials() -> None:
    assert (Tally(full=False).trials(short=4, long=100), Tally(full=True).trials(short=4, long=100)) == (
        range(4),
        range(100),
    )
