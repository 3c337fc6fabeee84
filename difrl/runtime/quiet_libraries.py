"""Silence diffusers and transformers: their progress bars would disturb difrl's display."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import diffusers.utils.logging as diffusers_logging
import transformers.utils.logging as transformers_logging

LIBRARIES = (diffusers_logging, transformers_logging)


class _SharedChange:
    """A change of global settings while any thread is in a block. The last thread to leave restores them."""

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        """change: makes the change, and returns a function that takes it back."""
        self.change, self.lock, self.inside = change, threading.Lock(), 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if self.inside == 0:
                self.restore = self.change()
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if self.inside == 0:
                    self.restore()


def _hide_bars() -> Callable[[], None]:
    shown = [library for library in LIBRARIES if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()

    def restore() -> None:
        for library in shown:
            library.enable_progress_bar()

    return restore


def _report_errors_only() -> Callable[[], None]:
    levels = [(library, library.get_verbosity()) for library in LIBRARIES]
    for library in LIBRARIES:
        library.set_verbosity_error()

    def restore() -> None:
        for library, level in levels:
            library.set_verbosity(level)

    return restore


without_bars = _SharedChange(_hide_bars)
"""Show no progress bars of both libraries, and of the hub, in a block of any thread."""
_with_errors_only = _SharedChange(_report_errors_only)


@contextmanager
def silenced_libraries() -> Iterator[None]:
    """Report only errors of both libraries in the block, without progress bars."""
    with _with_errors_only(), without_bars():
        yield
