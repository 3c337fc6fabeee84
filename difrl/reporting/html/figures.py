"""Charts as HTML figures: a title, a legend with definitions, and a drawing for every horizontal axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from difrl.reporting import number_format as formats
from difrl.reporting.html.charts import MOST_POINTS, Line, line_chart, smoothing_window, stacked_chart
from difrl.reporting.html.glossary import definition
from difrl.reporting.html.panels import Chart
from difrl.reporting.html.read_run import AXES

WIDE_RANGE = 30  # a chart with `log` gets a logarithmic axis if its values span more than this factor


def training_figure(chart: Chart, nfe_name: str) -> str:
    """Return a figure with a drawing for every axis of the data. page.css shows the selected one. Empty without data."""
    titles = {"step": "step", "nfe": nfe_name, "minutes": "minutes of training"}
    drawings = {}
    for axis in AXES:
        lines = [line for line in (curve.line(axis) for curve in chart.curves) if line.x]
        if axis == "step" or any(max(line.x) > 0 for line in lines):
            log, whole_x = chart.log and any(map(_wide, lines)), axis == "step"
            drawings[axis] = (
                stacked_chart(lines, titles[axis], whole_x=whole_x)
                if chart.stacked
                else line_chart(lines, titles[axis], log=log, whole_x=whole_x)
            )
    drawings = {axis: svg for axis, svg in drawings.items() if svg}
    if not drawings:
        return ""
    plots = "".join(f'<div class="by by-{axis}">{svg}</div>' for axis, svg in drawings.items())
    return figure(chart.title, [curve.line("step") for curve in chart.curves], plots, chart.note, " ".join(drawings))


def figure(title: str, lines: Sequence[Line], plots: str, note: str = "", axes: str = "", values: bool = True) -> str:
    """Return a figure. With `values`, which fits curves over time, the legend shows the latest value of each line."""
    small = f'<p class="note">{escape(note)}</p>' if note else ""
    legend = ""
    for line in lines:
        tip = escape(f"{line.key}: {definition(line.key)}".rstrip(": "), quote=True)
        latest = f" <b>{formats.number(line.latest)}</b>" if values else ""
        legend += f'<li tabindex="0" data-tip="{tip}"><i class="c{line.colour}"></i>{escape(line.label)}{latest}</li>'
    which = f' data-axes="{axes}"' if axes else ""
    return (
        f'<figure class="chart"{which}><figcaption><h3>{escape(title)}</h3><ul class="legend">{legend}</ul>'
        f"</figcaption>{plots}{small}</figure>"
    )


def smoothing_note(charts: Sequence[Chart]) -> str:
    """Return the meaning of thin and thick lines, or an empty string if the charts have no thin lines."""
    lines = [curve.line("step") for chart in charts if not chart.stacked for curve in chart.curves]
    longest = max((len(line.x) for line in lines if line.noisy), default=0)
    if not longest:
        return ""
    binned = f" Each point is the mean of {longest / MOST_POINTS:.1f} steps." if longest > MOST_POINTS else ""
    window = smoothing_window(min(longest, MOST_POINTS))
    return f"Thin lines: every step; thick lines: running mean of {window} points.{binned}"


def _wide(line: Line) -> bool:
    values = [value for value in line.y if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) / min(values) > WIDE_RANGE
