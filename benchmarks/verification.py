"""Comparison of every method with its known answer, through the real trainer; writes docs/verification.md.

    python -m benchmarks.verification --seeds 0 1 2        trains what is missing, then writes the page

An arena is a module of benchmarks/arenas with cells to train and a section of the page to write. Finished cells are only
read (--runs), so the command may be stopped and called again. On one CPU thread all of it takes about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arenas import gaussian_page, text_cells, text_page
from benchmarks.arenas.gaussian_page import CELLS

Result = dict[str, float]
Results = Mapping[str, Sequence[Result]]
"""Cell -> one result a seed."""


@dataclass(frozen=True)
class Arena:
    """A task with known answers, and the cells that are trained on it."""

    name: str
    cells: Sequence[str]
    run: Callable[[str, int, Path], Result]
    """(cell, seed, an empty folder) -> result."""
    page: Callable[[Results], str]
    """Return its section in Markdown."""


ARENAS = (
    Arena("gaussian", [cell.name for cell in CELLS], gaussian_page.run, gaussian_page.page),
    Arena("text", [cell.name for cell in text_cells.CELLS], text_page.run, text_page.page),
)

HEADER = """# Verification

The distribution at which each method ends, measured and in closed form: trained by the ordinary trainer, on tasks with known
solutions. Written by `python -m benchmarks.verification`; do not edit by hand.
"""


def measured(arena: Arena, cell: str, seed: int, runs: Path) -> Result:
    """Return the result of a cell from its file, or else train and measure it."""
    path = runs / arena.name / f"{cell}-{seed}.json"
    if not path.exists():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = arena.run(cell, seed, Path(folder))
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".partial")
        aside.write_text(json.dumps(result))
        aside.replace(path)
        print(f"{arena.name} {cell} seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    found: Result = json.loads(path.read_text())
    return found


def main() -> None:
    """Train what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/verification"), help="where results are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/verification.md"))
    options = parser.parse_args()
    sections = [HEADER]
    for arena in ARENAS:
        pairs = [(cell, seed) for seed in options.seeds for cell in arena.cells]
        done = {pair: measured(arena, *pair, options.runs) for pair in pairs}
        sections.append(arena.page({c: [done[c, seed] for seed in options.seeds] for c in arena.cells}))
    options.out.write_text("\n".join(sections), encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
