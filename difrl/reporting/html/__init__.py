"""Report: one self-contained HTML page about one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from difrl.reporting.html.page import render_page
from difrl.reporting.html.read_run import read_run
from difrl.runtime.files import atomic_write_text
from difrl.runtime.progress import phase

__all__ = ["write_report"]


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write report.html from run folders, and return its path.

    `out` is a file or a folder. With several run folders the page begins with a comparison. The page contains its pictures,
    style and script, so it needs no network and no other file. An earlier report survives a full disk. Missing or damaged
    files of a run are listed on the page. Raise ValueError without run folders, MissingFile if one does not exist.
    """
    if not run_dirs:
        raise ValueError("no run folders were given; expected at least one, e.g. runs/quickstart")
    with phase("writing the report"):
        runs = [read_run(Path(folder)) for folder in run_dirs]
        target = out / "report.html" if out.is_dir() else out
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(target, render_page(runs))
    return target
