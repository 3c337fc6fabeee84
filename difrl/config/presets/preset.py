"""The record of a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A method: its purpose, its source and its settings."""

    summary: str
    source: str
    """arXiv number."""
    settings: Mapping[str, Any] = field(repr=False)
