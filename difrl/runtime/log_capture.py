"""Warnings of the rewards package on the progress display."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _ShowHandler(logging.Handler):
    def __init__(self, show: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        self.show(record.getMessage())


@contextmanager
def route_warnings(show: Callable[[str], object]) -> Iterator[None]:
    """Route warnings of rewards to `show`, in place of standard error, during the block."""
    logger, handler = logging.getLogger("rewards"), _ShowHandler(show)
    propagated = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
