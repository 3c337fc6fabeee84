"""Regular expressions of users. They are compiled here and matched in a worker (`rewards.workers`): a match may take forever."""

from __future__ import annotations

import re
from functools import lru_cache

CACHED = 65536
"""Number of compiled patterns that are cached: all samples of a prompt have the same pattern."""


@lru_cache(CACHED)
def compile_pattern(pattern: str, option: str) -> re.Pattern[str]:
    """Return a regular expression in which . matches line breaks too. ValueError names the option if it is invalid."""
    try:
        return re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{option} is not a regular expression: {error}; found {pattern!r}") from error


def matches(pattern: str, text: str, whole: bool) -> bool:
    """Whether a pattern is found in a text, or matches the whole text."""
    compiled = compile_pattern(pattern, "pattern")
    return (compiled.fullmatch if whole else compiled.search)(text) is not None


def last_match(pattern: str, text: str) -> list[str]:
    """Return the last match in a text, or its first group if it has one, as a list; an empty list without a match."""
    found = [match.group(match.re.groups and 1) or "" for match in compile_pattern(pattern, "pattern").finditer(text)]
    return found[-1:]


def find_all(pattern: str, text: str) -> list[tuple[int, int, str]]:
    """Return where each match and its first group start, and the group; a group without a match is empty, at −1."""
    found = compile_pattern(pattern, "pattern").finditer(text)
    return [(match.start(), match.start(1), match.group(1) or "") for match in found]
