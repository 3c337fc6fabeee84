"""The live panel of a training run, redrawn in place on a terminal; it fits 80 columns."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from rich.console import Console, ConsoleRenderable, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from difrl.reporting import number_format as formats
from difrl.reporting.summary import Summary
from difrl.reporting.terminal.final_summary import COLOURS, print_summary
from difrl.reporting.terminal.progress import Progress, RunFacts, Standing, started

MOST_ROWS = 4  # watched rewards, and anchors, that get a line of their own
SPARK = 24  # characters of history beside each number
DOT = " · "


class LiveDisplay:
    """A panel that is redrawn in place; evaluations and messages scroll away above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self._live: Live | None = None
        self._lock = threading.Lock()  # the panel is drawn from rich's refresh thread while the trainer records

    def start(self, facts: RunFacts) -> None:
        self.progress = Progress(facts)
        self._live = Live(console=self.console, get_renderable=self.panel, refresh_per_second=4)
        self._live.start()

    def step(self, metrics: Mapping[str, float]) -> None:
        with self._lock:
            started(self.progress).record(metrics)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        progress = started(self.progress)
        with self._lock:
            progress.record_evaluation(metrics)
        place = f"[dim]step {progress.evaluated_at[-1]:>{len(str(progress.facts.steps))}}[/dim]"
        parts = [f"{escape(one.name)} [bold]{one.text}[/bold]" for one in progress.standings()]
        self.console.print("   ".join([place, *parts]))

    def message(self, text: str) -> None:
        self.console.print(Text(text, style="yellow"))

    def finish(self, summary: Summary) -> None:
        self.close()
        print_summary(self.console, summary)

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def panel(self) -> ConsoleRenderable:
        with self._lock:
            progress = started(self.progress)
            heading = f"[bold]{escape(progress.facts.name)}[/bold]"
            details = escape(DOT.join(progress.facts.details))
            body = Group(self._bar(progress), Text(), self._rows(progress), Text(), self._foot(progress))
            return Panel(
                body,
                title=heading,
                title_align="left",
                subtitle=f"[dim]{details}[/dim]" if details else None,
                subtitle_align="right",
                border_style="dim",
                padding=(0, 1),
            )

    def _bar(self, progress: Progress) -> Table:
        facts = progress.facts
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        table.add_column(no_wrap=True, justify="right")
        left = formats.duration(progress.seconds_left())
        table.add_row(
            f"step [bold]{progress.step}[/bold]/{facts.steps}",
            ProgressBar(total=max(1, facts.steps), completed=progress.step, complete_style="cyan"),
            f"[bold]{left}[/bold] left",
        )
        return table

    def _rows(self, progress: Progress) -> Table:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True, max_width=14, style="dim")
        table.add_column(no_wrap=True, min_width=13)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, width=SPARK, style="cyan")
        table.add_column(no_wrap=True, ratio=1, justify="right", style="dim")
        name, rewards = progress.rewards()
        shown = [Standing(name, "training prompts", rewards, formats.trend(rewards))]
        shown += progress.standings()[: 1 + MOST_ROWS]
        for one in shown:
            arrow = Text(formats.ARROWS[one.direction] if one.values else " ", style=COLOURS[one.direction])
            table.add_row(escape(one.name), f"[bold]{one.text}[/bold]", arrow, _spark(one.values), escape(one.note))
        for key in progress.anchors()[:MOST_ROWS]:
            values = progress.history[key]
            arrow = Text(formats.ARROWS[formats.trend(values)], style="dim")  # neither direction is better
            latest = f"[bold]{formats.number(values[-1])}[/bold]"
            table.add_row(f"KL to {escape(key.removeprefix('kl/'))}", latest, arrow, _spark(values), "")
        return table

    def _foot(self, progress: Progress) -> Table:
        table = Table.grid(expand=True)
        table.add_column(no_wrap=True, ratio=1, style="dim", overflow="ellipsis")
        table.add_column(no_wrap=True, justify="right", style="dim")
        stages = progress.stage_seconds()
        whole = sum(stages.values())
        shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in stages.items() if whole > 0)
        if progress.history:
            speed = f"[default bold]{progress.samples_per_second():.1f}[/default bold] samples/s"
            split = f"{DOT}{formats.number(progress.step_seconds())} s a step" + (f": {shares}" if shares else "")
        else:
            speed, split = "waiting for the first step", ""
        table.add_row(speed + split, f"  {formats.duration(progress.elapsed())}")
        return table


def _spark(values: list[float]) -> str:
    return formats.sparkline(values, SPARK) if len(values) > 1 else ""
