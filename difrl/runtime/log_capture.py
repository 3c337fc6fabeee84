"""Warnings of difrl's packages and of the libraries, passed to a display in place of standard error.

Libraries repeat themselves: one warning per prompt, per file, per step. Each kind of theirs is shown once, and once more with
its count at the end.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

# Both give their loggers a handler when they are imported.
import diffusers.utils.logging  # noqa: F401
import transformers.utils.logging  # noqa: F401

OWN = ("difrl", "rewards", "samplers")
LIBRARIES = ("accelerate", "datasets", "diffusers", "huggingface_hub", "peft", "torch", "transformers")
LONGEST = 300
"""Characters of a library's message that are shown."""
VARYING = re.compile(r"\[.*\]|'[^']*'|\"[^\"]*\"|`[^`]*`|\d+", re.DOTALL)
"""Parts in which messages of the same kind may differ."""


class _ShowHandler(logging.Handler):
    def __init__(self, show: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        self.show(record.getMessage())


class _CountingHandler(logging.Handler):
    """Handler that shows the first message of each kind, and counts them."""

    def __init__(self, show: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self.show = show
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.count(f"{record.name.partition('.')[0]}: {record.getMessage()}")

    def count(self, text: str) -> None:
        text = " ".join(text.split())
        kind = VARYING.sub("", text)
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            self.first[kind] = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
            self.show(self.first[kind])

    def summarise(self) -> None:
        """Show the kinds that came more than once, with their counts."""
        for kind, count in self.counts.items():
            if count > 1:
                self.show(f"{count} times: {self.first[kind]}")


@contextmanager
def route_warnings(show: Callable[[str], object]) -> Iterator[None]:
    """Route warnings of difrl, rewards and samplers to `show`, in place of standard error, during the block."""
    # The pretraining logs its steps for the handlers of the root logger.
    with _replaced_handlers({name: _ShowHandler(show) for name in OWN}, propagating="difrl"):
        yield


@contextmanager
def count_library_warnings(show: Callable[[str], object]) -> Iterator[None]:
    """Route warnings of the libraries to `show` during the block: the first of each kind, and at the end the counts."""
    handler, show_warning = _CountingHandler(show), warnings.showwarning

    def count(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        handler.count(f"{category.__name__}: {message}")

    warnings.showwarning = count
    try:
        with _replaced_handlers(dict.fromkeys(LIBRARIES, handler)):
            yield
    finally:
        warnings.showwarning = show_warning
        handler.summarise()


@contextmanager
def _replaced_handlers(handlers: Mapping[str, logging.Handler], propagating: str = "") -> Iterator[None]:
    """Replace the handlers of loggers during the block. Their records do not reach the root logger."""
    loggers = {name: logging.getLogger(name) for name in handlers}
    before = {name: (logger.handlers, logger.propagate) for name, logger in loggers.items()}
    for name, logger in loggers.items():
        logger.handlers, logger.propagate = [handlers[name]], name == propagating
    try:
        yield
    finally:
        for name, logger in loggers.items():
            logger.handlers, logger.propagate = before[name]
