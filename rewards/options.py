"""Validation of the options of rewards."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

T = TypeVar("T")


def check_choice(reward: str, option: str, value: T, choices: Collection[T]) -> T:
    """Return ``value`` if it is one of the choices, else raise ValueError."""
    if value not in choices:
        raise ValueError(f"reward '{reward}': {option} is {value!r}, expected one of {', '.join(map(str, choices))}")
    return value


def check_at_least_one(reward: str, **options: int) -> None:
    """Raise ValueError if one of the options, by name, is below 1."""
    for option, value in options.items():
        if value < 1:
            raise ValueError(f"reward '{reward}': {option} is {value}, expected at least 1")
