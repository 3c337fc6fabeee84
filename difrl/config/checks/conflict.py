"""What a check of a run's config finds."""

from __future__ import annotations

from typing import NamedTuple


class Misfit(NamedTuple):
    """Settings that are each valid and do not go together."""

    path: tuple[str | int, ...]
    problem: str


class MisfitError(ValueError):
    """Every misfit of a config."""

    def __init__(self, misfits: list[Misfit]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, m.path))}: {m.problem}" for m in misfits))
        self.misfits = misfits
