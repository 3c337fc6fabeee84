"""Progress of a run as plain lines, for logs, pipes and CI."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console

from difrl.reporting import number_format as formats
from difrl.reporting.summary import RunSummary
from difrl.reporting.terminal.final_summary import print_summary
from difrl.reporting.terminal.history import History, RunFacts, started
from difrl.reporting.terminal.phases import PhaseLog
from difrl.reporting.terminal.streams import accepts_unicode

ASCII = str.maketrans({"↗": "^", "→": ">", "↘": "v", "±": "+/-", "·": "-"})
WIDTH = 100


class PlainDisplay:
    """Display of one line a step, with aligned fields and no control characters, and one line an evaluation."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.history: History | None = None
        self.phases = PhaseLog(self.message)

    def open(self) -> None:
        """Begin to write lines about slow phases, until `close`."""
        self.phases.start()

    def start(self, facts: RunFacts) -> None:
        self.history = History(facts)
        size = f"{formats.pluralise(facts.steps, 'step')} of {formats.pluralise(facts.samples_per_step, 'sample')}"
        self.message(" · ".join([facts.name, *facts.details, size]))

    def step(self, metrics: Mapping[str, float]) -> None:
        history = started(self.history)
        history.record(metrics)
        reward = history.reward()
        fields = [
            _place("step", history.step, history.facts.steps),
            f"{reward.name} {reward.text:>7} {formats.ARROWS[reward.direction or 0]}",
            *(f"{row.name} {row.text:>7}" for row in history.anchors()),
            f"{history.samples_per_second():6.1f} samples/s",
            f"{formats.duration(history.seconds_left()):>8} left",
        ]
        self.message("   ".join(fields))

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        history = started(self.history)
        history.record_evaluation(metrics)
        parts = [f"{row.name} {row.text}" for row in history.evaluated()]
        self.message("   ".join([_place("eval", history.evaluated_at[-1], history.facts.steps), *parts]))

    def message(self, text: str) -> None:
        """Print a line. Characters that the stream cannot encode are replaced by ASCII, so that a log never stops a run."""
        if not accepts_unicode(self.stream):
            text = text.translate(ASCII).encode("ascii", "replace").decode("ascii")
        self.phases.last = time.monotonic()
        print(text, file=self.stream, flush=True)

    def finish(self, summary: RunSummary) -> None:
        self.close()
        page = io.StringIO()
        console = Console(file=page, force_terminal=False, no_color=True, highlight=False, width=WIDTH)
        print_summary(console, summary)
        for line in page.getvalue().splitlines():
            self.message(line.rstrip())

    def close(self) -> None:
        self.phases.stop()


def _place(word: str, step: int, steps: int) -> str:
    return f"{word} {step:>{len(str(steps))}}/{steps}"
