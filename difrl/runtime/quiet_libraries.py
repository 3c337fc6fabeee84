"""Silence diffusers and transformers: their progress bars would disturb difrl's display."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import diffusers.utils.logging as diffusers_logging
import transformers.utils.logging as transformers_logging

LIBRARIES = (diffusers_logging, transformers_logging)


@contextmanager
def without_bars() -> Iterator[None]:
    """Show no progress bars of both libraries, and of the hub, in the block. Restore their settings afterwards."""
    bars = [library.is_progress_bar_enabled() for library in LIBRARIES]
    for library in LIBRARIES:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, bar in zip(LIBRARIES, bars, strict=True):
            if bar:
                library.enable_progress_bar()


@contextmanager
def silenced_libraries() -> Iterator[None]:
    """Report only errors of both libraries in the block, without progress bars. Restore their settings afterwards."""
    levels = [library.get_verbosity() for library in LIBRARIES]
    for library in LIBRARIES:
        library.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        for library, level in zip(LIBRARIES, levels, strict=True):
            library.set_verbosity(level)
