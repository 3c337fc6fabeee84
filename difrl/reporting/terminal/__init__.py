"""Displays of a run in progress: a live panel on a terminal, one aligned line a step elsewhere (a file, a pipe, CI).

A display only receives. The trainer does not wait for it, and no result depends on it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Protocol, TextIO, cast

from rich.console import Console

from difrl.reporting.summary import RunSummary
from difrl.reporting.terminal.final_summary import summary_table
from difrl.reporting.terminal.history import RunFacts
from difrl.reporting.terminal.live import LiveDisplay
from difrl.reporting.terminal.phases import show_phases
from difrl.reporting.terminal.plain import PlainDisplay
from difrl.reporting.terminal.streams import DroppedWhenClosed, is_plain

__all__ = [
    "Display",
    "LiveDisplay",
    "PlainDisplay",
    "RunFacts",
    "RunSummary",
    "SilentDisplay",
    "open_display",
    "show_phases",
    "summary_table",
]


class Display(Protocol):
    """A receiver of the events of a run. `finish` or `close` ends it, and both may be called more than once."""

    def start(self, facts: RunFacts) -> None: ...
    def step(self, metrics: Mapping[str, float]) -> None: ...
    def evaluation(self, metrics: Mapping[str, float]) -> None: ...
    def message(self, text: str) -> None: ...
    def finish(self, summary: RunSummary) -> None: ...
    def close(self) -> None:
        """Restore the terminal. Callers do this in a `finally`, because it is also needed after an exception."""


def open_display(stream: TextIO | None = None, plain: bool | None = None) -> Display:
    """Return an open display: a live panel if `stream` (default: standard output) is a capable terminal, else plain lines.

    Dumb terminals, and terminals without UTF-8, get plain lines. `plain` overrides the choice. The display shows phases that
    take long from now on, and must be closed.
    """
    output = cast(TextIO, DroppedWhenClosed(stream or sys.stdout))
    console = Console(file=output, highlight=False)
    if plain is None:
        plain = is_plain(console)
    display = PlainDisplay(output) if plain else LiveDisplay(console)
    display.open()
    return display


class SilentDisplay:
    """No output, for all processes but the first and for callers without a terminal."""

    def start(self, facts: RunFacts) -> None: ...
    def step(self, metrics: Mapping[str, float]) -> None: ...
    def evaluation(self, metrics: Mapping[str, float]) -> None: ...
    def message(self, text: str) -> None: ...
    def finish(self, summary: RunSummary) -> None: ...
    def close(self) -> None: ...
