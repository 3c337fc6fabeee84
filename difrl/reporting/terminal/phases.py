"""Phases of long work on a terminal, as one line with a bar, and in logs, as an occasional line.

A phase appears once it has lasted for some seconds, so quick work shows nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from difrl.reporting.number_format import duration
from difrl.reporting.terminal.streams import is_plain
from difrl.runtime.progress import Phase, open_phases

PATIENCE = 3.0
"""Seconds after which a phase is shown."""
SILENCE = 30.0
"""Seconds without output after which a log gets another line about a phase that it has had before."""
BAR = 24
"""Characters of the bar."""


def describe(phase: Phase) -> str:
    """Return a phase as "evaluation 96/256", or as its name if nothing is counted."""
    return phase.name if phase.total is None else f"{phase.name} {min(phase.done, phase.total)}/{phase.total}"


def describe_time(phase: Phase, now: float) -> str:
    """Return the time left, extrapolated from the work done, or the time spent if nothing is counted yet."""
    spent, done = now - phase.began, phase.done - phase.before
    if phase.total is None or done <= 0:
        return duration(spent)
    return f"{duration(spent * max(0, phase.total - phase.done) / done)} left"


def find_slow(phases: Sequence[Phase], now: float, patience: float = PATIENCE) -> list[Phase]:
    """Return the phases that have lasted for `patience` seconds or longer."""
    return [phase for phase in phases if now - phase.began >= patience]


class PhaseLine:
    """One line about the open phases, or nothing, as a renderable of rich. It is drawn anew at every refresh."""

    def __init__(self, patience: float = PATIENCE, *, reserve: bool = False) -> None:
        self.patience = patience
        self.reserve = reserve
        """True to draw an empty line while there is nothing to show."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = time.monotonic()
        slow = find_slow(open_phases(), now, self.patience)
        if not slow:
            yield from [Text()] if self.reserve else []
            return
        counted = next((phase for phase in reversed(slow) if phase.total), slow[-1])
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        line.add_column(width=BAR)
        line.add_column(no_wrap=True, justify="right", min_width=9, style="dim")
        bar = ProgressBar(counted.total, counted.done, complete_style="cyan") if counted.total else ""
        line.add_row(Text(" · ".join(map(describe, slow))), bar, describe_time(counted, now))
        yield line


class PhaseLog:
    """Lines about phases for logs: one when a phase is first slow, later ones only into silence."""

    def __init__(self, write: Callable[[str], object], patience: float = PATIENCE, silence: float = SILENCE) -> None:
        self.write, self.patience, self.silence = write, patience, silence
        self.last = time.monotonic()
        """Time of the last line, of this log or of another writer."""
        self._seen = set[str]()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def tick(self, now: float) -> None:
        """Write a line if one is due."""
        slow = find_slow(open_phases(), now, self.patience)
        if not slow or (slow[-1].name in self._seen and now - self.last < self.silence):
            return
        self._seen.update(phase.name for phase in slow)
        self.last = now
        self.write(f"{' · '.join(map(describe, slow))}   {describe_time(slow[-1], now)}")

    def start(self) -> None:
        """Write lines from a thread of its own until `stop`. Starting twice is the same as once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="phases", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            self.tick(time.monotonic())


@contextmanager
def show_phases(stream: TextIO | None = None) -> Iterator[None]:
    """Show phases on a stream (default: standard error) during the block. Nothing of the line stays on a terminal."""
    console = Console(file=stream or sys.stderr, highlight=False)
    if is_plain(console):
        log = PhaseLog(lambda text: print(text, file=console.file, flush=True))
        log.start()
        try:
            yield
        finally:
            log.stop()
        return
    with Live(PhaseLine(), console=console, transient=True):
        yield
