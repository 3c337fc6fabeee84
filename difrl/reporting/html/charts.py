"""Line and area charts as inline SVG. Colours are CSS classes, so one drawing serves light pages, dark pages and print."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import pairwise

from difrl.reporting.html.axes import Scale, padded_scale, tight_scale
from difrl.reporting.number_format import mean_of_finite

CHART_WIDTH, CHART_HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 54, CHART_WIDTH - 14, 12, CHART_HEIGHT - 40
MOST_POINTS = 400  # a longer series is averaged into this many bins
NEAR_EDGE = 90  # pixels: the label of a mark closer to the right edge is drawn at its left
SMOOTH_FROM = 30  # points; shorter series are drawn as they are

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One series of a chart."""

    key: str
    label: str
    x: list[float]
    y: list[float]
    colour: int = 1
    error: list[float] = field(default_factory=list)
    """Half the height of the band around each point."""
    dots: bool = False
    """True for a rarely measured series, of which every point is drawn."""
    smooth: bool = True
    """True if a long series is drawn as a thin line with its running mean."""
    ringed: int | None = None
    """Index of a point with a ring around it."""

    @property
    def latest(self) -> float:
        return next((value for value in reversed(self.y) if math.isfinite(value)), math.nan)

    @property
    def noisy(self) -> bool:
        return self.smooth and not self.dots and len(self.x) >= SMOOTH_FROM

    def reach(self, log: bool) -> list[float]:
        """Return the heights that the axis must include. A logarithmic axis has no 0, so it clips bands."""
        finite = [value for value in self.y if math.isfinite(value)]
        if log or not self.error:
            return finite
        pairs = [(v, e) for v, e in zip(self.y, self.error, strict=True) if math.isfinite(v) and math.isfinite(e)]
        return finite + [v - e for v, e in pairs] + [v + e for v, e in pairs]


def line_chart(
    lines: Sequence[Line],
    x_title: str,
    *,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    whole_x: bool = False,
) -> str:
    """Return lines with error bands over a common grid, or an empty string if no value is finite.

    `log` makes the vertical axis logarithmic if all values are positive. `marks` are vertical rules, (x, label). `whole_x`
    puts ticks at integers only.
    """
    lines = [_binned(line) for line in lines if any(math.isfinite(value) for value in line.y)]
    if not lines:
        return ""
    log = log and all(value > 0 for line in lines for value in line.reach(log=True))
    x = tight_scale([value for line in lines for value in line.x], LEFT, RIGHT)
    y = padded_scale([value for line in lines for value in line.reach(log)], BOTTOM, TOP, log)
    body = [_grid(x, y, x_title, whole_x)]
    body += [_mark(x(place), label) for place, label in marks if x.low <= place <= x.high]
    body += [_band(line, x, y) for line in lines if line.error]
    body += [_strokes(line, x, y) for line in lines]
    return _svg(body, lines, x, y)


def stacked_chart(lines: Sequence[Line], x_title: str, *, whole_x: bool = False) -> str:
    """Return stacked areas of parts of a whole, which share their x. A missing part counts 0."""
    lines = [_binned(line) for line in lines if line.x]
    lines = [line for line in lines if line.x == lines[0].x]
    if not lines:
        return ""
    edges = [[0.0] * len(lines[0].x)]
    for line in lines:
        parts = [value if math.isfinite(value) else 0.0 for value in line.y]
        edges.append([low + part for low, part in zip(edges[-1], parts, strict=True)])
    x = tight_scale(lines[0].x, LEFT, RIGHT)
    y = Scale(0, max(edges[-1]) * 1.06 or 1.0, BOTTOM, TOP)
    body = [_grid(x, y, x_title, whole_x)]
    for line, (under, over) in zip(lines, pairwise(edges), strict=True):
        outline = [(x(a), y(b)) for a, b in zip(line.x, over, strict=True)]
        outline += [(x(a), y(b)) for a, b in zip(line.x, under, strict=True)][::-1]
        body.append(f'<path class="area c{line.colour}" d="{_path(outline)}Z"/>')
    return _svg(body, lines, x, y)


def render_sparkline(values: Sequence[float]) -> str:
    """Return a small curve without axes."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2 or max(finite) == min(finite):
        return ""
    x, y = Scale(0, len(finite) - 1, 3, 97), Scale(min(finite), max(finite), 25, 3)
    points = [(x(index), y(value)) for index, value in enumerate(finite)]
    dot = f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="2.6"/>'
    return f'<svg class="spark" viewBox="0 0 100 28" aria-hidden="true"><path d="{_path(points)}"/>{dot}</svg>'


def smoothing_window(points: int) -> int:
    """Return the odd number of points of the running mean: a tenth of the series, 3 to 25."""
    return min(25, max(3, points // 10 | 1))


def _grid(x: Scale, y: Scale, x_title: str, whole_x: bool) -> str:
    parts = []
    for value, label in y.ticks():
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{RIGHT}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 7}" y="{y(value) + 4:.1f}">{label}</text>')
    for value, label in x.ticks(6, whole_x):
        parts.append(f'<path class="grid" d="M{x(value):.1f} {BOTTOM}v4"/>')
        parts.append(f'<text class="tick x" x="{x(value):.1f}" y="{BOTTOM + 17}">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text class="title" x="{middle:.0f}" y="{CHART_HEIGHT - 6}">{escape(x_title)}</text>')
    return "".join(parts)


def _mark(at: float, label: str) -> str:
    inside = at + NEAR_EDGE < RIGHT
    place = f'x="{at + 4:.1f}"' if inside else f'x="{at - 4:.1f}" text-anchor="end"'
    return (
        f'<path class="mark" d="M{at:.1f} {TOP}V{BOTTOM}"/>'
        f'<text class="mark" {place} y="{TOP + 10}">{escape(label)}</text>'
    )


def _band(line: Line, x: Scale, y: Scale) -> str:
    finite = [
        (x(a), y(b - e), y(b + e))
        for a, b, e in zip(line.x, line.y, line.error, strict=True)
        if math.isfinite(b) and math.isfinite(e)
    ]
    if len(finite) < 2:
        return ""
    outline = [(a, high) for a, _, high in finite] + [(a, low) for a, low, _ in reversed(finite)]
    return f'<path class="band c{line.colour}" d="{_path(outline)}Z"/>'


def _strokes(line: Line, x: Scale, y: Scale) -> str:
    colour = f"c{line.colour}"
    points = [(x(a), y(b) if math.isfinite(b) else math.nan) for a, b in zip(line.x, line.y, strict=True)]
    finite = [point for point in points if math.isfinite(point[1])]
    if line.noisy:
        heights = _running_mean([b for _, b in points], smoothing_window(len(points)))
        smooth = [(a, height) for (a, _), height in zip(points, heights, strict=True)]
        raw = f'<path class="raw {colour}" d="{_path(points)}"/>'
        return f'{raw}<path class="line {colour}" d="{_path(smooth)}"/>'
    stroke = f'<path class="line {colour}" d="{_path(points)}"/>'
    if line.dots or len(finite) == 1:
        stroke += "".join(f'<circle class="{colour}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in finite)
    if line.ringed is not None:
        a, b = points[line.ringed]
        stroke += f'<circle class="ring {colour}" cx="{a:.1f}" cy="{b:.1f}" r="7"/>'
    return stroke


def _running_mean(values: list[float], window: int) -> list[float]:
    """Return centred means, of fewer values at both ends."""
    half = window // 2
    near = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return [
        mean_of_finite(around) if math.isfinite(one) else math.nan for one, around in zip(values, near, strict=True)
    ]


def _binned(line: Line) -> Line:
    """Return at most MOST_POINTS points, each the mean of consecutive points."""
    size = len(line.x)
    if size <= MOST_POINTS:
        return line
    edges = [round(index * size / MOST_POINTS) for index in range(MOST_POINTS + 1)]
    bins = [slice(start, end) for start, end in pairwise(edges)]
    return replace(
        line,
        x=[mean_of_finite(line.x[one]) for one in bins],
        y=[mean_of_finite(line.y[one]) for one in bins],
        error=[mean_of_finite(line.error[one]) for one in bins] if line.error else [],
    )


def _path(points: Sequence[Point]) -> str:
    """Return M and L commands. Points that are not finite interrupt the line."""
    parts, pen_down = [], False
    for a, b in points:
        finite = math.isfinite(b)
        if finite:
            parts.append(f"{'L' if pen_down else 'M'}{a:.1f} {b:.1f}")
        pen_down = finite
    return "".join(parts)


def _svg(body: list[str], lines: Sequence[Line], x: Scale, y: Scale) -> str:
    """Return the drawing. Its attribute data-chart holds the numbers that page.js shows at the pointer."""
    series = [
        {
            "label": line.label,
            "colour": line.colour,
            "x": _rounded(line.x),
            "y": _rounded(line.y),
            "error": _rounded(line.error) if line.error else None,
        }
        for line in lines
    ]
    data = {"x": [x.low, x.high, x.start, x.end], "top": y.end, "bottom": y.start, "lines": series}
    text = escape(json.dumps(data, separators=(",", ":")), quote=True)
    names = escape(", ".join(line.label for line in lines), quote=True)
    return (
        f'<svg class="plot" viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{names}" '
        f'data-chart="{text}">{"".join(body)}<path class="cursor" d=""/></svg>'
    )


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]
