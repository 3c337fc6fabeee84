"""What libraries of this repository log while a run trains, shown where the run is shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from difrl.display import Display


class _Shown(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        self.display.message(record.getMessage())


@contextmanager
def notices(display: Display) -> Iterator[None]:
    """Warnings of rewards go to the display, and not to standard error as well."""
    logger, shown = logging.getLogger("rewards"), _Shown(display)
    propagated = logger.propagate
    logger.addHandler(shown)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(shown)
        logger.propagate = propagated
