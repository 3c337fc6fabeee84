"""Last output of a run: changes on the evaluation prompts, and the paths of the results."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from difrl.reporting import number_format as formats
from difrl.reporting.summary import RunSummary, changes, suspicious

DIRECTION_COLOURS = {formats.RISING: "green", formats.LEVEL: "dim", formats.FALLING: "red"}


def summary_table(
    before: Mapping[str, float], after: Mapping[str, float], stderr: Mapping[str, float] | None = None
) -> Table:
    """Return before → after ± standard error of every metric that both evaluations have; see `summary.changes`."""
    table = Table(
        Column(),
        Column(),
        Column("before", justify="right"),
        Column(justify="center"),
        "after",
        "change",
        box=None,
        padding=(0, 2, 0, 0),
        title="On the evaluation prompts",
        title_justify="left",
        title_style="bold",
        header_style="dim",
    )
    for column in table.columns:
        column.no_wrap = True
    for change in changes(before, after, stderr):
        colour = DIRECTION_COLOURS[change.direction]
        clear = "" if change.direction else " (not clear)"
        table.add_row(
            escape(change.name),
            f"[dim]{change.role}[/dim]",
            formats.number(change.before),
            "→",
            f"[bold]{formats.number(change.after)}[/bold]{formats.plus_minus(change.after_stderr)}",
            f"[{colour}]{formats.signed(change.difference)}{clear}[/{colour}]",
        )
    return table


def print_summary(console: Console, summary: RunSummary) -> None:
    """Print the table, a warning if a watched metric fell, and the paths, each unbroken on its own line."""
    console.print()
    found = changes(summary.before, summary.after)
    if found:
        console.print(summary_table(summary.before, summary.after))
        if fell := suspicious(found):
            names = ", ".join(change.label for change in fell)
            console.print(f"[red]{escape(names)} fell while the trained reward rose: look at the samples.[/red]")
        console.print()
    if summary.guard:
        console.print(f"[red]{escape(summary.guard)}[/red]\n")
    took = f" in {formats.duration(summary.seconds)}" if math.isfinite(summary.seconds) else ""
    console.print(f"[dim]done     [/dim]{formats.pluralise(summary.steps, 'step')}{took}")
    for word, path in (("model", summary.model), ("samples", summary.picture), ("report", summary.report)):
        if path:
            console.print(Text.assemble((f"{word:<9}", "dim"), path), soft_wrap=True)
