"""Numbers as people read them, shared by the terminal display and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"
RISING, LEVEL, FALLING = 1, 0, -1
ARROWS = {RISING: "↗", LEVEL: "→", FALLING: "↘"}
CLEAR = 2.0  # standard errors beyond which a change is called a change


def number(value: float) -> str:
    """Three decimals for everyday sizes, four significant digits above, scientific below a thousandth."""
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
    return number(value) if math.isnan(value) or value < 0 else f"+{number(value)}"


def plus_minus(error: float | None) -> str:
    """Return " ± 0.015", to be put behind a value; empty if the error is unknown."""
    return "" if error is None or not math.isfinite(error) else f" ± {number(error)}"


def count(value: float) -> str:
    """1234 -> 1,234 and 1234567 -> 1.23 M."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as 4:07 or 1:02:33; '-:--' while unknown."""
    if not math.isfinite(seconds):
        return "-:--"
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` characters; a long history is averaged into equal bins, NaN is left blank."""
    if not values or width < 1:
        return ""
    bins = min(width, len(values))
    edges = [round(index * len(values) / bins) for index in range(bins + 1)]
    means = [mean(values[start:end]) for start, end in pairwise(edges)]
    known = [one for one in means if math.isfinite(one)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    reach = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((one - low) * reach)] if math.isfinite(one) else " " for one in means)


def mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def trend(values: Sequence[float], window: int = 20) -> int:
    """Direction of the last `window` values: the least-squares slope, level within two standard errors.

    slope = Σ(x−x̄)(y−ȳ) / Sxx, standard error = sqrt(Σ residual² / (n−2) / Sxx). Under four values: level.
    """
    known = [value for value in values[-window:] if math.isfinite(value)]
    size = len(known)
    if size < 4:
        return LEVEL
    centre, average = (size - 1) / 2, sum(known) / size
    spread = sum((place - centre) ** 2 for place in range(size))
    slope = sum((place - centre) * (value - average) for place, value in enumerate(known)) / spread
    left = sum((value - average - slope * (place - centre)) ** 2 for place, value in enumerate(known))
    error = math.sqrt(left / (size - 2) / spread)
    if abs(slope) <= CLEAR * error or slope == 0:
        return LEVEL
    return RISING if slope > 0 else FALLING
