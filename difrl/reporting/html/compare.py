"""Comparison of several runs: a table, overlaid curves and the settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from difrl.reporting import number_format as formats
from difrl.reporting.html.figures import training_figure
from difrl.reporting.html.panels import comparison_charts, nth_colour
from difrl.reporting.html.read_run import RunRecord
from difrl.reporting.html.sections import TONE, VERDICT, axis_switch, note, picture, section
from difrl.reporting.summary import Change

IGNORED = ("output_dir",)  # always different, and already the name of the run


def comparison(runs: Sequence[RunRecord]) -> str:
    """Return the comparison as HTML."""
    nfe_name = runs[0].nfe_name
    figures = "".join(training_figure(chart, nfe_name) for chart in comparison_charts(runs))
    return (
        f"<header><p class='kicker'>difrl comparison</p><h1>{len(runs)} runs</h1></header>{_table(runs)}"
        + section("Side by side", f'<div class="charts">{figures}</div>', axis_switch(nfe_name))
        + _differences(runs)
        + _last_samples(runs)
    )


def _table(runs: Sequence[RunRecord]) -> str:
    """Return a row a run, a column a metric that any of them has."""
    found = [{change.key: change for change in run.changes()} for run in runs]
    columns = {key: change for row in found for key, change in row.items()}
    head = "".join(f"<th>{escape(change.name)}<small>{change.role}</small></th>" for change in columns.values())
    rows = ""
    for index, (run, row) in enumerate(zip(runs, found, strict=True)):
        warning = ' <span title="see the notes on this run folder below">⚠</span>' if run.problems else ""
        link = f'<a href="#run-{escape(run.name, quote=True)}">{escape(run.name)}</a>'
        cells = "".join(f"<td>{_cell(row.get(key))}</td>" for key in columns)
        rows += f'<tr><th><i class="c{nth_colour(index)}"></i>{link}{warning}</th>{cells}{_cost(run)}</tr>'
    return (
        f'<section><div class="scroll"><table><thead><tr><th>run</th>{head}<th>steps</th>'
        f"<th>{runs[0].nfe_name}</th><th>time</th></tr></thead><tbody>{rows}</tbody></table></div>"
        f"{note('Before → after on evaluation prompts, ± one standard error.')}</section>"
    )


def _cost(run: RunRecord) -> str:
    if not run.rows:
        return "<td>0</td><td>–</td><td>–</td>"
    last = run.rows[-1]
    evaluations = formats.count(last["nfe"]) if last["nfe"] > 0 else "–"
    return f"<td>{last['step']:.0f}</td><td>{evaluations}</td><td>{formats.duration(last['minutes'] * 60)}</td>"


def _cell(change: Change | None) -> str:
    if change is None:
        return "–"
    tone, verdict = TONE[change.direction], VERDICT[change.direction]
    return (
        f"{formats.number(change.before)} → <b>{formats.number(change.after)}</b>"
        f'<span class="error">{formats.plus_minus(change.after_stderr)}</span>'
        f'<small class="change {tone}" title="{verdict}">{formats.signed(change.difference)}</small>'
    )


def _differences(runs: Sequence[RunRecord]) -> str:
    """Return a table of the settings that are not the same in all runs."""
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in IGNORED]
    different = [key for key in keys if len({str(one.get(key, "–")) for one in flat}) > 1]
    if not different:
        return f"<section>{note('The settings of these runs are the same.')}</section>" if any(flat) else ""
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = ""
    for key in different:
        cells = "".join(f"<td>{escape(str(one.get(key, '–')))}</td>" for one in flat)
        rows += f"<tr><th><code>{escape(key)}</code></th>{cells}</tr>"
    table = f"<thead><tr><th>key</th>{head}</tr></thead><tbody>{rows}</tbody>"
    return section("Settings that differ", f'<div class="scroll"><table class="settings">{table}</table></div>')


def _flatten(value: object, prefix: str = "") -> list[tuple[str, object]]:
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flatten(inner, f"{prefix}{key}.")]
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return [pair for index, inner in enumerate(value) for pair in _flatten(inner, f"{prefix}{index}.")]
    return [(prefix.rstrip("."), value)]


def _last_samples(runs: Sequence[RunRecord]) -> str:
    shown = [(run, run.frames[-1]) for run in runs if run.frames]
    if len(shown) < 2:
        return ""
    figures = "".join(
        f'<figure class="frame end"><figcaption>{escape(run.name)}, step <b>{frame.step}</b></figcaption>'
        f"{picture(frame.picture, f'Samples of {run.name} at step {frame.step}')}</figure>"
        for run, frame in shown
    )
    return section("Last samples", f'<div class="pair">{figures}</div>')
