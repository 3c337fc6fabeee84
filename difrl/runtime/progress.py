"""Phases of long work. The functions that do the work open phases, and a display reads them whenever it draws.

Nothing is sent: an open phase is a record in this process, and a program without a display ignores it.

    with phase("evaluation", total=256):
        for rows in parts:
            ...
            count_done(len(rows))
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class Phase:
    """A piece of work in progress."""

    name: str
    total: int | None = None
    """Number of units of work, if they can be counted."""
    done: int = 0
    before: int = 0
    """Units that were done before the phase began, by an earlier process."""
    began: float = field(default_factory=time.monotonic)
    thread: int = field(default_factory=threading.get_ident)


_open: list[Phase] = []
"""Open phases of all threads, outer ones before inner ones."""


@contextmanager
def phase(name: str, total: int | None = None, done: int = 0) -> Iterator[Phase]:
    """Open a phase during the block. done: units that are done already."""
    opened = Phase(name, total, done, done)
    _open.append(opened)
    try:
        yield opened
    finally:
        _open.remove(opened)


def count_done(count: int = 1) -> None:
    """Count units of work as done, in the innermost phase that this thread has opened. Without a phase, do nothing."""
    own = threading.get_ident()
    for opened in reversed(_open):
        if opened.thread == own:
            opened.done += count
            return


def open_phases() -> tuple[Phase, ...]:
    """Return the open phases, outer ones before inner ones."""
    return tuple(_open)
