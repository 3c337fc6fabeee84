"""What `difrl check` prints: the estimate of a run as one table of 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from difrl.reporting import number_format as formats

if TYPE_CHECKING:
    from difrl.training.cost.estimate import Estimate

UNITS = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))


def estimate_table(estimate: Estimate) -> RenderableType:
    """Parameters, memory, evaluations and time of a run."""
    each = "each process" if estimate.processes > 1 else ""
    return Group(
        Text(estimate.model, style="bold", overflow="fold"),
        Text(f"trains {formats.count(estimate.trained)} parameters, {formats.count(estimate.frozen)} are frozen"),
        Text(),
        _memory(estimate, each),
        Text(),
        _evaluations(estimate),
        Text(),
        _time(estimate),
        Text(),
        Text(_basis(estimate), style="dim"),
    )


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    first, *others = headings
    table.add_column(first, min_width=32, overflow="fold", header_style="bold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _memory(estimate: Estimate, each: str) -> Table:
    table = _table("Memory", each)
    for name, size in estimate.memory.items():
        table.add_row(Text(name), size_of(size))
    total = sum(estimate.memory.values())
    room = "" if estimate.capacity is None else f" of {size_of(estimate.capacity)}"
    tight = estimate.capacity is not None and total > estimate.capacity
    table.add_row("in all, at least", f"[{'bold red' if tight else 'bold'}]{size_of(total)}[/]{room}")
    return table


def _evaluations(estimate: Estimate) -> Table:
    counts = estimate.evaluations
    words = estimate.words
    table = _table(words.heading, "a step", "the run")
    for name, count in words.counted.items():
        table.add_row(name, formats.count(count), formats.count(count * counts.steps))
    rows = {
        words.rollout: counts.rollout,
        "updates, with gradient": counts.gradient,
        "old weights and anchors": counts.references,
    }
    for name, count in rows.items():
        if count:
            table.add_row(name, formats.count(count), formats.count(count * counts.steps))
    table.add_row("in all", f"[bold]{formats.count(counts.step)}[/]", f"[bold]{formats.count(counts.run)}[/]")
    if counts.draws > 1:
        extra = (counts.draws - 1) * counts.rollout
        table.add_row("further draws (collect), up to", formats.count(extra), formats.count(extra * counts.steps))
    if counts.compared:
        table.add_row("reference samples, up to", "", formats.count(counts.compared))
    if counts.evaluation:
        table.add_row("evaluation", "", formats.count(counts.evaluation))
    return table


def _time(estimate: Estimate) -> Table:
    table = _table("Time, a rough estimate", "a step", "the run")
    table.add_row("in the model", span(*estimate.step_seconds), span(*estimate.run_seconds))
    return table


def _basis(estimate: Estimate) -> str:
    forward, training, speed = (_flops(n) for n in (estimate.forward, estimate.training, estimate.speed))
    low, high = estimate.efficiency
    words = estimate.words
    return (
        f"From {forward}s {words.unit}, {training}s with its gradient, at {low:.0%} to {high:.0%} of the "
        f"{speed}/s just measured on {estimate.device}. {words.left_out}"
    )


def _flops(count: float) -> str:
    """With the unit's prefix beside it, such as 1.2 GFLOP."""
    said = formats.count(count)
    return f"{said}FLOP" if said[-1].isalpha() else f"{said} FLOP"


def size_of(count: float) -> str:
    """Bytes in a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} TiB"


def span(low: float, high: float) -> str:
    """Two durations in the unit of the longer one, to two digits."""
    length, unit = next((n, u) for n, u in UNITS if high >= n or n == UNITS[-1][0])
    return f"{_rough(low / length)} – {_rough(high / length)} {unit}"


def _rough(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 99.5 else f"{value:.2g}"
