"""The finding of a check."""

from __future__ import annotations

from typing import NamedTuple

from difrl.config.schema.base import KeyPath


class ConfigConflict(NamedTuple):
    """Settings that are valid one by one and exclude each other."""

    path: KeyPath
    problem: str


class ConfigConflictError(ValueError):
    """All conflicts of a config. pydantic collects it as a ValueError, and `describe_errors` gives every conflict its place."""

    def __init__(self, conflicts: list[ConfigConflict]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, c.path))}: {c.problem}" for c in conflicts))
        self.conflicts = conflicts
