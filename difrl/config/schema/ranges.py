"""What a number or a schedule of a recipe can come to."""

from __future__ import annotations

from typing import Protocol


class Levelled(Protocol):
    """A section that stands for a number."""

    @property
    def levels(self) -> tuple[float, ...]:
        """The numbers between which it stays (a controller: at which it starts)."""


def levels_of(value: float | Levelled) -> tuple[float, ...]:
    """The numbers between which a value stays: itself, or its section's levels."""
    return (float(value),) if isinstance(value, int | float) else value.levels
