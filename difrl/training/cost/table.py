"""Print an estimate as tables of 80 columns."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from difrl.reporting.number_format import count
from difrl.training.cost.estimate import Estimate

DURATION_UNITS = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))


def estimate_table(estimate: Estimate) -> RenderableType:
    """Return the parameters, memory, evaluations and time of a run."""
    model = estimate.model
    time = _table("Time, a rough estimate", "a step", "the run")
    time.add_row(
        "in the model", format_duration_range(*estimate.step_seconds), format_duration_range(*estimate.run_seconds)
    )
    forward, training, speed = map(_flops, (model.forward, model.training, estimate.speed))
    low, high = model.efficiency
    basis = (
        f"From {forward}s {model.wording.unit}, {training}s with its gradient, at {low:.0%} to {high:.0%} of the "
        f"{speed}/s just measured on {estimate.device}. {model.wording.left_out}"
    )
    return Group(
        Text(model.name, style="bold", overflow="fold"),
        f"trains {count(model.trained)} parameters, {count(model.frozen)} are frozen",
        *map(Text, model.notes),
        "",
        _memory(estimate),
        "",
        _evaluations(estimate),
        "",
        time,
        "",
        Text(basis, style="dim"),
    )


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    first, *others = headings
    table.add_column(first, min_width=32, overflow="fold", header_style="bold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _memory(estimate: Estimate) -> Table:
    table = _table("Memory", "each process" if estimate.processes > 1 else "")
    for name, size in estimate.memory.items():
        table.add_row(Text(name), format_size(size))
    total, capacity = sum(estimate.memory.values()), estimate.capacity
    room = "" if capacity is None else f" of {format_size(capacity)}"
    style = "bold" if capacity is None or total <= capacity else "bold red"
    table.add_row("in all, at least", f"[{style}]{format_size(total)}[/]{room}")
    return table


def _evaluations(estimate: Estimate) -> Table:
    counts, wording = estimate.evaluations, estimate.model.wording
    table = _table(wording.heading, "a step", "the run")
    if estimate.model.generated is not None:
        table.add_row("generated", count(estimate.model.generated), count(estimate.model.generated * counts.steps))
    parts = (wording.rollout, counts.rollout), ("updates, with gradient", counts.gradient)
    for name, number in (*parts, ("old weights and anchors", counts.without_gradient)):
        if number:
            table.add_row(name, count(number), count(number * counts.steps))
    table.add_row("in all", f"[bold]{count(counts.step)}[/]", f"[bold]{count(counts.run)}[/]")
    if counts.draws > 1:
        extra = (counts.draws - 1) * counts.rollout
        table.add_row("further draws (collect), up to", count(extra), count(extra * counts.steps))
    for name, number in (("reference samples, up to", counts.reference_samples), ("evaluation", counts.evaluation)):
        if number:
            table.add_row(name, "", count(number))
    return table


def _flops(number: float) -> str:
    """Return a number of FLOPs with the prefix beside the unit, such as 1.2 GFLOP."""
    written = count(number)
    return f"{written}FLOP" if written[-1].isalpha() else f"{written} FLOP"


def format_size(number: float) -> str:
    """Return a number of bytes in a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.3g} TiB"


def format_duration_range(low: float, high: float) -> str:
    """Return two durations in the unit of the longer one, to two digits."""
    length, unit = next((n, u) for n, u in DURATION_UNITS if high >= n or n == DURATION_UNITS[-1][0])
    rough = [f"{float(f'{t / length:.2g}'):,.0f}" if t / length >= 99.5 else f"{t / length:.2g}" for t in (low, high)]
    return f"{rough[0]} – {rough[1]} {unit}"
