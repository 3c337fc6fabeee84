"""Ctrl-C as a request to stop after the current step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from difrl.reporting.terminal import Display


@dataclass
class Stop:
    """A request to stop."""

    requested: bool = False
    """True once Ctrl-C was pressed."""


@contextmanager
def stop_requested(display: Display) -> Iterator[Stop]:
    """Yield a request that the first Ctrl-C (or SIGTERM) sets. A second one interrupts at once."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        display.message("stopping after this step; once more to stop at once, without saving it")

    try:
        previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # outside the main thread, the caller handles signals
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
