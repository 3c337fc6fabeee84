"""Ctrl-C, SIGTERM and SIGHUP as a request to stop after the current step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from difrl.reporting.terminal import Display


@dataclass
class Stop:
    """A request to stop."""

    requested: bool = False
    """True once Ctrl-C was pressed."""


def _discard(streams: Iterable[int]) -> None:
    """Discard further output: writing to a terminal that is gone raises an error, which would end the run before it is saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)


@contextmanager
def stop_requested(display: Display) -> Iterator[Stop]:
    """Yield a request that the first Ctrl-C, SIGTERM or SIGHUP (a closed terminal) sets. A second one interrupts at once.

    A process that ignores SIGHUP, as nohup starts it, goes on.
    """
    stop, terminals = Stop(), [stream for stream in (1, 2) if os.isatty(stream)]

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        if number == signal.SIGHUP:
            _discard(terminals)
        display.message("stopping after this step; once more to stop at once, without saving it")

    try:
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signals = [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]
        previous = {s: signal.signal(s, handle) for s in signals}
    except ValueError:  # outside the main thread, the caller handles signals
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
