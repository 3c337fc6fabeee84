"""Numbers formatted for people, in the terminal and in the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

ScoreTable = Sequence[Sequence[float | None]]
"""Scores [row][sample] of a sheet, None for a sample that was not scored."""

BARS = "▁▂▃▄▅▆▇█"
RISING, LEVEL, FALLING = 1, 0, -1
ARROWS = {RISING: "↗", LEVEL: "→", FALLING: "↘"}
CLEAR = 2.0  # a change counts if it is larger than this many standard errors


def pluralise(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 step" and "2 steps"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def number(value: float) -> str:
    """Return three decimals below 100, one below 10,000, and scientific notation for other sizes and below 0.001."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    size = abs(value)
    if size == 0 or 1e-3 <= size < 100:
        return f"{value:.3f}"
    if 100 <= size < 1e4:
        return f"{value:.1f}"
    return f"{value:.1e}"


def signed(value: float) -> str:
    """Return the number with its sign, also if it is positive."""
    return number(value) if math.isnan(value) or value < 0 else f"+{number(value)}"


def plus_minus(error: float | None) -> str:
    """Return " ± 0.015", to be put behind a value; empty if the error is unknown."""
    return "" if error is None or not math.isfinite(error) else f" ± {number(error)}"


def count(value: float) -> str:
    """Return a large number in a short form: 1234 -> 1,234 and 1234567 -> 1.23 M."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Return seconds as 4:07 or 1:02:33, and NaN as -:--."""
    if not math.isfinite(seconds):
        return "-:--"
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def sparkline(values: Sequence[float], width: int) -> str:
    """Return at most `width` bars. A long history is averaged into equal bins; NaN becomes a space."""
    if not values or width < 1:
        return ""
    bins = min(width, len(values))
    edges = [round(index * len(values) / bins) for index in range(bins + 1)]
    means = [mean_of_finite(values[start:end]) for start, end in pairwise(edges)]
    finite = [one for one in means if math.isfinite(one)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    reach = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((one - low) * reach)] if math.isfinite(one) else " " for one in means)


def mean_of_finite(values: Sequence[float]) -> float:
    """Return the mean of the finite values, NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def trend(values: Sequence[float], window: int = 20) -> int:
    """Return the direction of the last `window` values, by the slope of their least-squares line.

    slope = Σ(x−x̄)(y−ȳ) / Sxx, standard error = sqrt(Σ residual² / (n−2) / Sxx). A slope within two standard errors of 0,
    and fewer than four values, count as level.
    """
    finite = [value for value in values[-window:] if math.isfinite(value)]
    size = len(finite)
    if size < 4:
        return LEVEL
    centre, average = (size - 1) / 2, sum(finite) / size
    spread = sum((x - centre) ** 2 for x in range(size))
    slope = sum((x - centre) * (y - average) for x, y in enumerate(finite)) / spread
    residual = sum((y - average - slope * (x - centre)) ** 2 for x, y in enumerate(finite))
    error = math.sqrt(residual / (size - 2) / spread)
    if abs(slope) <= CLEAR * error or slope == 0:
        return LEVEL
    return RISING if slope > 0 else FALLING
