"""Ctrl-C, SIGTERM and SIGHUP as a request to stop after the current step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from difrl.reporting.terminal import Display


@dataclass
class Stop:
    """A request to stop."""

    requested: bool = False
    """True once a signal came."""


SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a run after its step. Windows has no SIGHUP, the signal of a closed terminal."""


def _discard(streams: Iterable[int]) -> None:
    """Discard further output: writing to a terminal that is gone raises an error, which would end the run before it is saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)


@contextmanager
def stop_requested(display: Display) -> Iterator[Stop]:
    """Yield a request that the first Ctrl-C, SIGTERM or SIGHUP (a closed terminal) sets. A second one interrupts at once.

    A second SIGHUP does not: the terminal and the shell both send one. A process that ignores a signal, as nohup starts it,
    goes on.
    """
    stop, terminals = Stop(), [stream for stream in (1, 2) if os.isatty(stream)]

    def handle(number: int, frame: FrameType | None) -> None:
        closed = signal.Signals(number).name == "SIGHUP"
        if stop.requested:
            if closed:
                return
            raise KeyboardInterrupt
        stop.requested = True
        if closed:
            _discard(terminals)
        with suppress(RuntimeError):  # the signal came while a line was being written, and streams cannot be re-entered
            display.message("stopping after this step; once more to stop at once, without saving it")

    try:
        previous = {s: signal.signal(s, handle) for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
    except ValueError:  # outside the main thread, the caller handles signals
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
