"""Completions beside their prompts and rewards: on a terminal, as a text file or as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console, ConsoleRenderable, Group
from rich.table import Table
from rich.text import Text

from difrl.reporting.number_format import ScoreTable, number

SHEET_WIDTH = 80
EMPTY = "(empty)"
"""Shown in the place of a completion without text."""


@dataclass(frozen=True)
class TextSheet:
    """Completions of P prompts, N of each, in one or more sets, such as before and after."""

    prompts: Sequence[str]
    sets: Mapping[str, Sequence[Sequence[str]]]
    """Label -> [P][N]."""
    scores: Mapping[str, ScoreTable]
    """Label -> [P][N], None for a text that was not scored. Sets may be missing."""

    default: ClassVar[Path | None] = None

    def show(self, console: Console) -> None:
        console.print(self)
        console.print()

    def __rich__(self) -> ConsoleRenderable:
        parts: list[ConsoleRenderable] = []
        for row, prompt in enumerate(self.prompts):
            parts += [Text(visible(prompt), style="bold"), self._completions(row), Text()]
        return Group(*parts[:-1])

    def _completions(self, row: int) -> Table:
        """Return a line a completion: the set (on its first line), the reward if it is known, and the text."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="dim")
        table.add_column(justify="right", no_wrap=True, style="cyan")
        table.add_column(overflow="fold")
        for label, texts in self.sets.items():
            scores = self.scores[label][row] if label in self.scores else [None] * len(texts[row])
            for place, (text, score) in enumerate(zip(texts[row], scores, strict=True)):
                shown = Text(visible(text)) if text else Text(EMPTY, style="dim")
                table.add_row(Text("" if place else f"  {label}"), "" if score is None else number(score), shown)
        return table

    def save(self, path: Path) -> Path:
        """Write JSON if the path ends in .json, else text, and return the path."""
        place = path if path.suffix else path.with_suffix(".txt")
        written = self.as_json() if place.suffix == ".json" else self.as_text()
        place.write_text(written, encoding="utf-8", errors="replace")
        return place

    def save_each(self, path: Path) -> Sequence[Path]:
        return ()

    def as_text(self) -> str:
        page = io.StringIO()
        Console(file=page, force_terminal=False, no_color=True, highlight=False, width=SHEET_WIDTH).print(self)
        return "\n".join(line.rstrip() for line in page.getvalue().split("\n"))

    def as_json(self) -> str:
        return json.dumps(self.as_data(), indent=1) + "\n"

    def as_data(self) -> dict[str, Any]:
        """Return {"prompts": [P], "sets": [{"label", "texts": [P][N], "scores": [P][N] or None}]}, as the report reads it."""
        sets = [
            {"label": label, "texts": texts, "scores": self.scores.get(label)} for label, texts in self.sets.items()
        ]
        return {"prompts": self.prompts, "sets": sets}


def visible(text: str) -> str:
    """Return the text with every character replaced that could move the cursor of a terminal or change its colours."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
