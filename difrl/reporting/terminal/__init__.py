"""What a person sees while a run trains.

`open_display()` picks a live panel on a terminal and one aligned line a step elsewhere (a file, a pipe,
CI). A display is told everything and asks nothing: the trainer never waits for it and no result depends
on it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Protocol, TextIO

from rich.console import Console

from difrl.reporting.summary import Summary
from difrl.reporting.terminal.final_summary import summary_table
from difrl.reporting.terminal.history import RunFacts
from difrl.reporting.terminal.live import LiveDisplay
from difrl.reporting.terminal.plain import PlainDisplay, speaks_unicode

__all__ = [
    "Display",
    "LiveDisplay",
    "PlainDisplay",
    "RunFacts",
    "SilentDisplay",
    "Summary",
    "open_display",
    "summary_table",
]


class Display(Protocol):
    """Told of a run as it happens. finish or close ends it; both may be called more than once."""

    def start(self, facts: RunFacts) -> None: ...
    def step(self, metrics: Mapping[str, float]) -> None: ...
    def evaluation(self, metrics: Mapping[str, float]) -> None: ...
    def message(self, text: str) -> None: ...
    def finish(self, summary: Summary) -> None: ...
    def close(self) -> None:
        """Give the terminal back, also after an exception: call it in a `finally`."""


def open_display(stream: TextIO | None = None, plain: bool | None = None) -> Display:
    """The live panel where `stream` (default: standard output) is a capable terminal, else plain lines.

    A terminal that does not speak UTF-8, or is dumb, counts as plain.
    """
    console = Console(file=stream or sys.stdout, highlight=False)
    if plain is None:
        plain = not console.is_terminal or console.is_dumb_terminal or not speaks_unicode(console.file)
    return PlainDisplay(stream) if plain else LiveDisplay(console)


class SilentDisplay:
    """For processes other than the first, and for callers that want no output."""

    def start(self, facts: RunFacts) -> None: ...
    def step(self, metrics: Mapping[str, float]) -> None: ...
    def evaluation(self, metrics: Mapping[str, float]) -> None: ...
    def message(self, text: str) -> None: ...
    def finish(self, summary: Summary) -> None: ...
    def close(self) -> None: ...
