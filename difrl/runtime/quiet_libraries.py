"""diffusers and transformers, quiet while they load and save: their progress bars would tear difrl's display."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import diffusers.utils.logging as of_diffusers
import transformers.utils.logging as of_transformers


@contextmanager
def silenced_libraries() -> Iterator[None]:
    """Inside the block both libraries report errors only, without progress bars; afterwards all is as it was."""
    libraries = (of_diffusers, of_transformers)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
