"""What a check of a run's config finds."""

from __future__ import annotations

from typing import NamedTuple


class ConfigConflict(NamedTuple):
    """Settings that are each valid and do not go together."""

    path: tuple[str | int, ...]
    problem: str


class ConfigConflictError(ValueError):
    """Every conflict of a config."""

    def __init__(self, conflicts: list[ConfigConflict]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, c.path))}: {c.problem}" for c in conflicts))
        self.conflicts = conflicts
