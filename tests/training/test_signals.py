"""Signals as a request to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from difrl.reporting.terminal import SilentDisplay
from difrl.training.interrupts import SIGNALS, stop_requested
from tests.training.test_run import Spoken


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request_and_is_said(number: signal.Signals) -> None:
    display = Spoken()
    with stop_requested(display) as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
    assert len(display.messages) == 1


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_one_interrupts_unless_it_is_that_of_the_terminal(
    first: signal.Signals, second: signal.Signals
) -> None:
    with stop_requested(SilentDisplay()):
        signal.raise_signal(first)
        if second == signal.SIGHUP:
            signal.raise_signal(second)
        else:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(second)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """nohup ignores SIGHUP, so that the run outlives its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_requested(SilentDisplay()) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_signal_in_the_middle_of_a_line_is_a_request_too() -> None:
    """The stream is busy: Python refuses to write to it from the handler."""

    class Busy(SilentDisplay):
        def message(self, text: str) -> None:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    with stop_requested(Busy()) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
