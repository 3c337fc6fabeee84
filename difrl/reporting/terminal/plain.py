"""The progress of a run as plain lines, for logs, pipes and CI."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console

from difrl.reporting import number_format as formats
from difrl.reporting.summary import Summary
from difrl.reporting.terminal.final_summary import print_summary
from difrl.reporting.terminal.progress import Progress, RunFacts, started

ASCII = str.maketrans({"↗": "^", "→": ">", "↘": "v", "±": "+/-", "·": "-"})
WIDTH = 100


class PlainDisplay:
    """One line a step with aligned fields and no control characters; evaluations get lines of their own."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.progress: Progress | None = None

    def start(self, facts: RunFacts) -> None:
        self.progress = Progress(facts)
        details = "".join(f" · {detail}" for detail in facts.details)
        self.message(f"{facts.name}{details} · {facts.steps} steps of {facts.samples_per_step} samples")

    def step(self, metrics: Mapping[str, float]) -> None:
        progress = started(self.progress)
        progress.record(metrics)
        name, rewards = progress.rewards()
        fields = [
            self._place("step", progress.step),
            f"{name} {formats.number(progress.latest(progress.facts.reward)):>7} {formats.ARROWS[formats.trend(rewards)]}",
            *(f"{key.replace('/', ' ')} {formats.number(progress.latest(key)):>7}" for key in progress.anchors()),
            f"{progress.samples_per_second():6.1f} samples/s",
            f"{formats.duration(progress.seconds_left()):>8} left",
        ]
        self.message("   ".join(fields))

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        progress = started(self.progress)
        progress.record_evaluation(metrics)
        parts = [f"{one.name} {one.text}" for one in progress.standings()]
        self.message("   ".join([self._place("eval", progress.evaluated_at[-1]), *parts]))

    def message(self, text: str) -> None:
        """Characters that the stream cannot write are spelled in ASCII: no log may stop a run."""
        if not speaks_unicode(self.stream):
            text = text.translate(ASCII).encode("ascii", "replace").decode("ascii")
        print(text, file=self.stream, flush=True)

    def finish(self, summary: Summary) -> None:
        page = io.StringIO()
        console = Console(file=page, force_terminal=False, no_color=True, highlight=False, width=WIDTH)
        print_summary(console, summary)
        for line in page.getvalue().splitlines():
            self.message(line.rstrip())

    def close(self) -> None: ...

    def _place(self, word: str, step: int) -> str:
        steps = started(self.progress).facts.steps
        return f"{word} {step:>{len(str(steps))}}/{steps}"


def speaks_unicode(stream: object) -> bool:
    """A stream in memory has no encoding and takes everything."""
    encoding = getattr(stream, "encoding", None)
    return encoding is None or encoding.lower().replace("-", "").startswith("utf")
