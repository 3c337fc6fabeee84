"""One self-contained HTML page about one run or several: see `write_report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from difrl.reporting.html.page import render
from difrl.reporting.html.read_run import read_run
from difrl.runtime.files import atomic_write_text

__all__ = ["write_report"]


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write report.html from run folders, and return its path.

    With several folders the page opens with a comparison. The page needs no network and no other file:
    pictures, style and script are inside. `out` may be a folder; the page is written aside and renamed, so an
    earlier report survives a full disk. What is missing or damaged in a run is said on the page.
    """
    if not run_dirs:
        raise ValueError("no run folders were given; expected at least one, e.g. runs/quickstart")
    runs = [read_run(Path(folder)) for folder in run_dirs]
    target = out / "report.html" if out.is_dir() else out
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(target, render(runs))
    return target
