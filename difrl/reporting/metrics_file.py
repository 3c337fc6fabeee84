"""metrics.jsonl: one JSON object a step, appended as the run goes and cut back when it resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from difrl.runtime.errors import UserError


class MetricsError(UserError):
    """A metrics file that was damaged."""


class MetricsFile:
    """Appends to metrics.jsonl, and to tensorboard where asked."""

    def __init__(self, run: Path, done: int, tensorboard: bool) -> None:
        """Keeps the lines of steps up to `done` and drops the rest, which the resumed run writes again.

        With nothing done, none is kept: the evaluation before the first step is written again too.
        """
        self.path = run / "metrics.jsonl"
        kept = [line for line, row in _lines(self.path) if done and (row["step"] or 0) <= done]
        aside = self.path.with_suffix(".partial")
        aside.write_text("".join(f"{line}\n" for line in kept))
        os.replace(aside, self.path)
        self.board = _board(run / "tensorboard", done) if tensorboard else None

    def write(self, metrics: Mapping[str, float]) -> None:
        """Appends one line; numbers that are not finite become null."""
        row = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self.path.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in metrics.items():
                if name != "step":
                    self.board.add_scalar(name, value, int(metrics["step"]))

    def amend(self, metrics: Mapping[str, float]) -> None:
        """Writes the last line anew."""
        aside = self.path.with_suffix(".partial")
        aside.write_text("".join(self.path.read_text().splitlines(keepends=True)[:-1]))
        os.replace(aside, self.path)
        self.write(metrics)

    def sync(self) -> None:
        """Returns when what was written is on the disk: a checkpoint must not survive a crash that its metrics do not."""
        with self.path.open("rb") as handle:
            os.fsync(handle.fileno())


def _board(folder: Path, done: int):  # type: ignore[no-untyped-def]
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=done + 1)


def _lines(path: Path) -> list[tuple[str, dict[str, float | None]]]:
    """Every line with its row. A killed process may leave half a last line, which is left out: its step is done again."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [(line, _row(line)) for line in lines]
    if rows and rows[-1][1] is None:
        rows.pop()
    for number, (line, row) in enumerate(rows, start=1):
        if row is None:
            raise MetricsError(
                f"{path}:{number}: expected a JSON object with a step, found {line[:60]!r}; the file was damaged. Restore it, "
                "or delete that line to go on without that step's metrics"
            )
    return [(line, row) for line, row in rows if row is not None]


def _row(line: str) -> dict[str, float | None] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run, null as NaN."""
    rows = [row for _, row in _lines(run / "metrics.jsonl")]
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
