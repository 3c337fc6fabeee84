"""What a preset is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A method: where it comes from, its place in the grid, and the settings that make it."""

    summary: str
    source: str
    """arXiv number."""
    likelihood: str
    objective: str
    anchor: str
    advantage: str
    settings: Mapping[str, Any] = field(repr=False)
