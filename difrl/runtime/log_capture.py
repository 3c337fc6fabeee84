"""What libraries of this repository log, shown where what they do is shown."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Shown(logging.Handler):
    def __init__(self, show: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        self.show(record.getMessage())


@contextmanager
def route_warnings(show: Callable[[str], object]) -> Iterator[None]:
    """Warnings of rewards are shown by this, and not on standard error as well."""
    logger, shown = logging.getLogger("rewards"), _Shown(show)
    propagated = logger.propagate
    logger.addHandler(shown)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(shown)
        logger.propagate = propagated
