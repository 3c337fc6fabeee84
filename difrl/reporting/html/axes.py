"""Scales of a chart: positions of values, and ticks at round numbers with their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

ROUND = (1, 2, 2.5, 5, 10)
NUMBER_UNITS = (
    (1e9, "G", 1e9),
    (1e6, "M", 1e6),
    (1e4, "k", 1e3),
)  # smallest size, letter, factor


@dataclass(frozen=True)
class Scale:
    """Map from [low, high] to pixels [start, end], linear or log10."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 5, whole: bool = False) -> list[tuple[float, str]]:
        """Return (value, label) of round numbers inside the scale."""
        if not self.log:
            values = ticks(self.low, self.high, most, whole)
            return list(zip(values, tick_labels(values), strict=True))
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps = (1, 2, 5) if last - first <= 2 else (1,)
        values = [10.0**power * one for power in range(first, last + 1) for one in steps]
        return [(value, f"{value:g}") for value in values if self.low <= value <= self.high]


def tight_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """Return a scale over exactly the range of the values, for a horizontal axis."""
    low, high = min(values), max(values)
    return Scale(low, high if high > low else low + 1, start, end)


def padded_scale(values: Sequence[float], start: float, end: float, log: bool = False) -> Scale:
    """Return a scale over the range of the values and a margin, for a vertical axis. It begins at 0 if a curve comes near 0."""
    low, high = min(values), max(values)
    if log:
        return Scale(low / 1.2, high * 1.2, start, end, log=True)
    room = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    near_zero = 0 <= low <= 0.25 * high
    return Scale(0.0 if near_zero else low - room, high + room, start, end)


def ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Return about `most` multiples of 1, 2, 2.5 or 5 times a power of ten inside [low, high]."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in ROUND if power * one >= rough * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return labels with enough decimals to distinguish neighbours. Large numbers get k, M or G, tiny ones an exponent."""
    most = max((abs(value) for value in values), default=0.0)
    for size, letter, stands_for in NUMBER_UNITS:
        if most >= size:
            return [f"{round(value / stands_for, 6):g}{letter}" if value else "0" for value in values]
    if 0 < most < 1e-3:
        return [f"{value:.1e}".replace("e-0", "e-") if value else "0" for value in values]
    gap = min((b - a for a, b in pairwise(values)), default=most or 1.0)
    decimals = max(0, math.ceil(-math.log10(gap) - 1e-9))
    if any(abs(round(value, decimals) - value) > gap * 1e-6 for value in values):
        decimals += 1  # a step of 2.5
    return [f"{value:.{decimals}f}" for value in values]
