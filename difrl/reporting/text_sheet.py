"""Completions beside the prompts that were asked and what each was worth: on a terminal, as a text file, as JSON."""

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

from difrl.reporting.number_format import number

WIDTH = 80
EMPTY = "(empty)"
"""What stands for a completion that ended at once."""

Scores = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class TextSheet:
    """Completions of P prompts, N of each, in one or more sets, such as before and after."""

    prompts: Sequence[str]
    sets: Mapping[str, Sequence[Sequence[str]]]
    """Label -> [P][N]."""
    scores: Mapping[str, Scores]
    """Label -> [P][N], None where nothing scored the text; of some of the sets, or none."""

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
        """A line a completion: the set on its first, then the reward where one is known, then the text."""
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
        """As JSON where the path ends so, else as text."""
        place = path if path.suffix else path.with_suffix(".txt")
        written = self.as_json() if place.suffix == ".json" else self.as_text()
        place.write_text(written, encoding="utf-8", errors="replace")
        return place

    def as_text(self) -> str:
        page = io.StringIO()
        Console(file=page, force_terminal=False, no_color=True, highlight=False, width=WIDTH).print(self)
        return "\n".join(line.rstrip() for line in page.getvalue().split("\n"))

    def as_json(self) -> str:
        return json.dumps(self.described(), indent=1) + "\n"

    def described(self) -> dict[str, Any]:
        """{"prompts": [P], "sets": [{"label", "texts": [P][N], "scores": [P][N], or none}]}: what the report reads."""
        sets = [
            {"label": label, "texts": texts, "scores": self.scores.get(label)} for label, texts in self.sets.items()
        ]
        return {"prompts": self.prompts, "sets": sets}


def visible(text: str) -> str:
    """Without characters that would move the cursor of a terminal, or colour it."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
