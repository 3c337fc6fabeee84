"""Format of the numbers on the pages of the arenas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def spread_of_seeds(values: Sequence[float]) -> str:
    """Return the mean, with the lowest and highest of the seeds if they differ after rounding."""
    if np.isnan(values).any():
        return "none"
    form = "{:.4f}" if max(values) < 1 else "{:.1f}"
    low, mean, high = (form.format(v) for v in (min(values), float(np.mean(values)), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"
