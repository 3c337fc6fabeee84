"""Where a sweep over RLG weights is highest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

WATCHED = "watch/"
Series = Sequence[float | None]


def argmax_known(values: Series) -> int | None:
    """The place of the largest number, the first of equals; None where nothing is known."""
    known = [place for place, value in enumerate(values) if value is not None and math.isfinite(value)]
    return max(known, key=lambda place: (values[place], -place)) if known else None


def watched_series(series: Mapping[str, Series]) -> dict[str, Series]:
    """The watched rewards of a sweep that were measured, by name; ensembles without their members."""
    names = [key for key in series if key.startswith(WATCHED) and "/" not in key.removeprefix(WATCHED)]
    return {key.removeprefix(WATCHED): series[key] for key in names if argmax_known(series[key]) is not None}


def best_weight_index(series: Mapping[str, Series]) -> int:
    """The place at which the watched reward is highest; the mean of several, each scaled to its range over the sweep.

    The trained reward has no say in it: it is what extrapolation may exploit. The first of equals wins, which is the
    least extrapolated one where weights ascend.
    """
    columns = list(watched_series(series).values())
    if not columns:
        raise ValueError("no watched reward was measured, so no weight is the best; name one, e.g. --rewards judge")
    scaled = [_scaled(column) for column in columns]
    found = argmax_known([sum(row) / len(row) for row in zip(*scaled, strict=True)])
    if found is None:
        raise ValueError("no weight has all watched rewards, so none is the best; choose one yourself")
    return found


def _scaled(values: Series) -> list[float]:
    """To [0, 1]; NaN where nothing is known, 0 where nothing changes."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    low, reach = min(known), max(known) - min(known)
    return [
        math.nan if value is None or not math.isfinite(value) else (value - low) / (reach or 1.0) for value in values
    ]
