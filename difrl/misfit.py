"""What a check of a run's config finds."""

from __future__ import annotations

from typing import NamedTuple


class Misfit(NamedTuple):
    """Settings that are each valid and do not go together."""

    path: tuple[str | int, ...]
    problem: str
