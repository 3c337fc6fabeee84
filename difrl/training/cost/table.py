"""Print an estimate as tables of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from difrl.reporting.number_format import count
from difrl.training.cost.estimate import Estimate
from difrl.training.cost.fits import CONTEXT, GIGABYTES, LADDER, PROCESSES, RESERVE, describe_changes, find_fits

DURATION_UNITS = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
IN_ALL = "in all"
"""Beginning of the name of a row with a sum."""
_IMAGES = (
    *("Model evaluations", "rollout", "an evaluation"),
    "Not in it: encoding prompts, decoding samples (whose memory grows with rollout.batch), rewards and files. "
    "A model so small that it leaves the device idle takes longer.",
)
_TEXTS = (
    *("Tokens read and written, at most", "drawing, prompts included", "a token"),
    "Not in it: rewards and files. Completions may end early, which takes less; drawing is bound by memory rather "
    "than by products, and a model so small that it leaves the device idle takes longer.",
)
"""Words of the table: a heading, the name of a rollout, the unit of evaluations, and what the time leaves out."""


def estimate_table(estimate: Estimate) -> RenderableType:
    """Return the parameters, memory, evaluations and time of a run."""
    model, counts, steps = estimate.model, estimate.evaluations, estimate.evaluations.steps
    heading, rollout, unit, left_out = _IMAGES if model.generated is None else _TEXTS

    held, capacity = estimate.process_memory, estimate.capacity
    total, phases = held.peak, held.phases
    memory: list[tuple[str, str | Text]] = [(name, format_size(size)) for name, size in held.kept.items()]
    memory += [(name, format_size(size)) for name, size in held.state.items()]
    memory += [
        (f"{name} ({phase})", format_size(size)) for phase, sizes in phases.items() for name, size in sizes.items()
    ]
    room = "" if capacity is None else f" of {format_size(capacity)}"
    style = "red" if capacity is not None and total > capacity else ""
    memory.append((f"{IN_ALL}, in the phase with most: {held.largest}", Text(format_size(total) + room, style)))

    a_step = {
        "generated": model.generated,
        rollout: counts.rollout,
        "updates, with gradient": counts.gradient,
        "old weights and anchors": counts.without_gradient,
        IN_ALL: counts.step,
        "first-update check": counts.check,
        "further draws (collect), up to": (counts.draws - 1) * counts.rollout,
    }
    evaluations = [(name, count(n), count(n * steps)) for name, n in a_step.items() if n]
    a_run = {"reference samples, up to": counts.reference_samples, "evaluation": counts.evaluation}
    evaluations += [(name, "", count(n)) for name, n in a_run.items() if n]

    seconds = ("in the model", *(format_duration_range(*s) for s in (estimate.step_seconds, estimate.run_seconds)))
    time = _table(["Time, a rough estimate", "a step", "the run"], [seconds])
    forward, training, speed = map(_flops, (model.forward, model.training, estimate.speed))
    low, high = model.efficiency
    basis = (
        f"From {forward}s {unit}, {training}s with its gradient, at {low:.0%} to {high:.0%} of the "
        f"{speed}/s just measured on {estimate.device}. {left_out}"
    )
    return Group(
        Text(model.name, style="bold", overflow="fold"),
        f"trains {count(model.trained)} parameters, {count(model.frozen)} are frozen",
        *map(Text, model.notes),
        "",
        _table(["Memory", "each process" if estimate.processes > 1 else ""], memory),
        "",
        _table([heading, "a step", "the run"], evaluations),
        *(("", time, "", Text(basis, style="dim")) if model.forward else ()),
        "",
        *_fits_tables(estimate),
    )


def _fits_tables(estimate: Estimate) -> list[RenderableType]:
    """Return the table of GPUs on which the recipe fits, and the settings that the names in it stand for."""
    fits = find_fits(estimate.counts, estimate.config)
    sizes = {size: [fits[size, n] for n in PROCESSES] for size in GIGABYTES}
    rows = [(f"{size} GB", *("—" if f is None else f.rung.name for f in row)) for size, row in sizes.items()]
    table = _table(["Fits on", *("1 GPU" if n == 1 else f"{n} GPUs" for n in PROCESSES)], rows, width=8)
    changes = {f.rung: describe_changes(estimate.config, f.config) for f in fits.values() if f is not None}
    legend = [f"{rung.name}: {changes[rung]}" for rung in LADDER if changes.get(rung)]
    note = (
        f"Each GPU has a process. Of its memory a context takes {format_size(CONTEXT)}, and the allocator {RESERVE - 1:.0%} "
        "more than it hands out. Attention keeps no matrix of tokens by tokens. A setting is named where those before it do not "
        "suffice."
    )
    return [table, "", *(Text(line, overflow="fold") for line in legend), Text(note, style="dim")]


def _table(headings: Sequence[str], rows: Iterable[Sequence[str | Text]], width: int = 32) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column(headings[0], min_width=width, overflow="fold", header_style="bold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        name = str(row[0])
        table.add_row(Text(name), *row[1:], style="bold" if name.startswith(IN_ALL) else "")
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
