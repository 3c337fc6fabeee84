"""Validation of the options of rewards."""

from __future__ import annotations

import re
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


def compile_pattern(pattern: str, option: str) -> re.Pattern[str]:
    """Return a regular expression in which . matches line breaks too. ValueError names the option if it is invalid."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{option} is not a regular expression: {error}; found {pattern!r}") from error


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """Return the last match in a text, or its first group if it has one; None without a match."""
    matches = list(pattern.finditer(text))
    return matches[-1].group(pattern.groups and 1) or "" if matches else None
