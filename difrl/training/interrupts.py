"""Ctrl-C as a request that a run honours between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from difrl.reporting.terminal import Display


@dataclass
class Stop:
    """Whether Ctrl-C was pressed."""

    requested: bool = False


@contextmanager
def stop_requested(display: Display) -> Iterator[Stop]:
    """Turns the first Ctrl-C (or SIGTERM) into a request that the loop honours after its step; a second one is immediate."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        display.message("stopping after this step; once more to stop at once, without saving it")

    try:
        previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs this there handles its own signals
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
