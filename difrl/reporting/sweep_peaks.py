"""Best weights of a sweep over RLG weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

WATCHED_PREFIX = "watch/"
Series = Sequence[float | None]


def argmax_known(values: Series) -> int | None:
    """Return the index of the first highest value, or None if no value is finite."""
    known = [index for index, value in enumerate(values) if value is not None and math.isfinite(value)]
    return max(known, key=lambda index: (values[index], -index)) if known else None


def watched_series(series: Mapping[str, Series]) -> dict[str, Series]:
    """Return the measured watched rewards of a sweep by name, without the members of ensembles."""
    names = [key for key in series if key.startswith(WATCHED_PREFIX) and "/" not in key.removeprefix(WATCHED_PREFIX)]
    return {key.removeprefix(WATCHED_PREFIX): series[key] for key in names if argmax_known(series[key]) is not None}


def best_weight_index(series: Mapping[str, Series]) -> int:
    """Return the index at which the watched reward is highest, or the mean of several, each scaled to its range.

    The trained reward does not count, because extrapolation may exploit it. The first of equal values wins: with ascending
    weights it extrapolates least. Raise ValueError if no weight has all watched rewards.
    """
    columns = list(watched_series(series).values())
    if not columns:
        raise ValueError("no watched reward was measured, so there is no best weight; add one, e.g. --rewards judge")
    scaled = [_scaled(column) for column in columns]
    index = argmax_known([sum(row) / len(row) for row in zip(*scaled, strict=True)])
    if index is None:
        raise ValueError("no weight has all watched rewards, so there is no best weight; choose one yourself")
    return index


def _scaled(values: Series) -> list[float]:
    """Return values scaled to [0, 1], NaN for unknown ones, all 0 for a constant series."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    low, reach = min(known), max(known) - min(known)
    return [
        math.nan if value is None or not math.isfinite(value) else (value - low) / (reach or 1.0) for value in values
    ]
