"""metrics.jsonl: one JSON object a step, appended during a run and cut back when the run is resumed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from difrl.reporting.trackers import Tracker
from difrl.runtime.errors import UserError
from difrl.runtime.files import atomic_write_text, flush_to_disk


class MetricsError(UserError):
    """A damaged metrics file."""


class MetricsFile:
    """metrics.jsonl of a run folder, opened for appending, and the trackers that receive the same metrics."""

    def __init__(self, run: Path, done: int, trackers: Sequence[Tracker] = ()) -> None:
        """Keep the lines of steps up to `done` and drop the others, which the resumed run writes again.

        With `done` = 0 no line is kept, because a new run also writes the evaluation before the first step again.
        """
        self.path = run / "metrics.jsonl"
        self.trackers = trackers
        kept = [(line, row) for line, row in _lines(self.path) if done and (row["step"] or 0) <= done]
        atomic_write_text(self.path, "".join(f"{line}\n" for line, _ in kept))
        self._last, self._before, self._digest = -1, hashlib.sha256(), hashlib.sha256()
        for line, row in kept:
            self._note(int(row["step"] or 0), line)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Append one line. NaN and infinity become null."""
        line = json.dumps({k: v if math.isfinite(v) else None for k, v in metrics.items()})
        with self.path.open("a") as handle:
            handle.write(line + "\n")
        self._note(int(metrics["step"]), line)
        for tracker in self.trackers:
            tracker.write(int(metrics["step"]), {k: v for k, v in metrics.items() if k != "step"})

    def amend(self, metrics: Mapping[str, float]) -> None:
        """Write the line of the last step again, with these metrics."""
        if self._last == int(metrics["step"]):
            atomic_write_text(self.path, "".join(self.path.read_text().splitlines(keepends=True)[:-1]))
            self._digest = self._before.copy()
        self.write(metrics)

    def digest(self, step: int) -> str:
        """Return the SHA-256 of the lines of steps up to `step`: all, or all but the last."""
        return (self._digest if self._last <= step else self._before).hexdigest()

    def _note(self, step: int, line: str) -> None:
        self._last, self._before = step, self._digest.copy()
        self._digest.update(f"{line}\n".encode())

    def sync(self) -> None:
        """Flush the file to the disk: a checkpoint that survives a crash must not be newer than its metrics."""
        flush_to_disk(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with ExitStack() as stack:
            for tracker in self.trackers:
                stack.callback(tracker.close)


def digest_metrics(run: Path, step: int) -> str:
    """Return `MetricsFile.digest` of the metrics of a run folder."""
    lines = [line for line, row in _lines(run / "metrics.jsonl") if (row["step"] or 0) <= step]
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def _lines(path: Path) -> list[tuple[str, dict[str, float | None]]]:
    """Return every line with its row.

    A killed process may leave an incomplete last line. It is left out, because its step is repeated.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MetricsError(f"{path}: cannot be read: {error.strerror}; make it readable for this user") from error
    rows = [(line, _row(line)) for line in lines]
    if rows and rows[-1][1] is None:
        rows.pop()
    for number, (line, row) in enumerate(rows, start=1):
        if row is None:
            raise MetricsError(
                f"{path}:{number}: expected a JSON object with a step, found {line[:60]!r}; the file is damaged. Restore it, "
                "or delete that line to continue without the metrics of that step"
            )
    return [(line, row) for line, row in rows if row is not None]


def _row(line: str) -> dict[str, float | None] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Return the rows of a run, with null as NaN."""
    rows = [row for _, row in _lines(run / "metrics.jsonl")]
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
