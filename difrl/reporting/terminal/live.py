"""Live panel of a training run, redrawn in place on a terminal. It fits 80 columns."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, ConsoleRenderable, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from difrl.reporting import number_format as formats
from difrl.reporting.summary import RunSummary
from difrl.reporting.terminal.final_summary import DIRECTION_COLOURS, print_summary
from difrl.reporting.terminal.history import History, HistoryRow, RunFacts, started
from difrl.reporting.terminal.phases import PhaseLine

MOST_ROWS = 4  # watched rewards, and anchors, that get a line of their own
SPARK = 24  # characters of history beside each number
DOT = " · "


class Elapsed(ProgressColumn):
    """Time since the start. Unlike the column of rich, it continues after the last step."""

    def render(self, task: Task) -> Text:
        return Text(formats.duration(task.elapsed or 0), style="dim")


class LiveDisplay:
    """Display of a panel that is redrawn in place. Evaluations and messages scroll away above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.history: History | None = None
        self.bar = Progress(
            TextColumn("step [bold]{task.completed}[/bold]/{task.total}"),
            BarColumn(None, complete_style="cyan", finished_style="cyan"),
            TextColumn("[bold]{task.fields[left]}[/bold] left"),
            TextColumn("[dim]·[/dim]"),
            Elapsed(),
            console=console,
            expand=True,
        )
        # Until the run starts, the line of phases is all there is, and nothing of it stays.
        self.live = Live(PhaseLine(), console=console, refresh_per_second=4, transient=True)

    def open(self) -> None:
        """Begin to show slow phases, until `close`."""
        self.live.start()

    def start(self, facts: RunFacts) -> None:
        self.history = History(facts)
        self.bar.add_task("", completed=facts.first_step, total=facts.steps, left=formats.duration(float("nan")))
        self.open()
        self.live.transient = False
        self.live.update(self.panel(), refresh=True)

    def step(self, metrics: Mapping[str, float]) -> None:
        history = started(self.history)
        history.record(metrics)
        left = formats.duration(history.seconds_left())
        self.bar.update(self.bar.task_ids[0], completed=history.step, left=left)
        self.live.update(self.panel())

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        history = started(self.history)
        history.record_evaluation(metrics)
        place = f"[dim]step {history.evaluated_at[-1]:>{len(str(history.facts.steps))}}[/dim]"
        parts = [f"{escape(row.name)} [bold]{row.text}[/bold]" for row in history.evaluated()]
        self.console.print("   ".join([place, *parts]))
        self.live.update(self.panel())

    def message(self, text: str) -> None:
        self.console.print(Text(text, style="yellow"))

    def finish(self, summary: RunSummary) -> None:
        self.close()
        print_summary(self.console, summary)

    def close(self) -> None:
        self.live.stop()

    def panel(self) -> ConsoleRenderable:
        history = started(self.history)
        rows = Table.grid(padding=(0, 1), expand=True)
        rows.add_column(no_wrap=True, max_width=14, style="dim")
        rows.add_column(no_wrap=True, min_width=13)
        rows.add_column(no_wrap=True)
        rows.add_column(no_wrap=True, width=SPARK, style="cyan")
        rows.add_column(no_wrap=True, ratio=1, justify="right", style="dim")
        for row in [history.reward(), *history.evaluated()[: 1 + MOST_ROWS]]:
            rows.add_row(*_cells(row, DIRECTION_COLOURS[row.direction or 0]))
        for row in history.anchors()[:MOST_ROWS]:
            rows.add_row(*_cells(row, "dim"))  # neither direction is better
        details = escape(DOT.join(history.facts.details))
        return Panel(
            Group(self.bar, Text(), rows, Text(), _speed(history), PhaseLine(reserve=True)),
            title=f"[bold]{escape(history.facts.name)}[/bold]",
            title_align="left",
            subtitle=f"[dim]{details}[/dim]" if details else None,
            subtitle_align="right",
            border_style="dim",
            padding=(0, 1),
        )


def _cells(row: HistoryRow, colour: str) -> tuple[str, str, Text, str, str]:
    arrow = "" if row.direction is None else formats.ARROWS[row.direction]
    spark = formats.sparkline(row.values, SPARK) if len(row.values) > 1 else ""
    return escape(row.name), f"[bold]{row.text}[/bold]", Text(arrow, style=colour), spark, escape(row.note)


def _speed(history: History) -> Text:
    parts = ["waiting for the first step"]
    if history.steps:
        stages = history.stage_seconds()
        whole = sum(stages.values())
        shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in stages.items() if whole > 0)
        parts = [
            f"[not dim bold]{history.samples_per_second():.1f}[/] samples/s",
            f"{formats.number(history.step_seconds())} s a step" + (f": {shares}" if shares else ""),
        ]
    text = Text.from_markup(DOT.join(parts), style="dim", overflow="ellipsis")
    text.no_wrap = True
    return text
