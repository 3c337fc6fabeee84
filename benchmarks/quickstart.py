"""AWM against Flow-GRPO: the same model, reward, prompts and seeds; reward against evaluations and against time.

    python benchmarks/quickstart.py --seeds 0 1 2          trains what is missing, then writes table and plot

Runs are resumable, and a run with a record is not repeated. Every run uses one CPU thread, `--jobs` of them at a time, so times
are comparable between the methods of one invocation only.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from common import Bench, Curve, Job, markdown, plot_curves, reach, spread

METHODS = {"quickstart": "AWM", "flow_grpo": "Flow-GRPO"}


def table(curves: Mapping[str, Sequence[Curve]], level: float) -> str:
    """Return a table of the reward at equal evaluations and the cost of a given reward; mean and range over seeds."""
    budget = min(c.nfe[-1] for runs in curves.values() for c in runs)
    header = (
        "method",
        "reward before",
        f"reward at {budget / 1e3:,.0f} k evaluations",
        "reward at the end",
        "judge before → end",
        f"k evaluations to {level:.2f}",
        f"minutes to {level:.2f}",
    )
    rows = [
        (
            method,
            spread([c.reward[0] for c in runs]),
            spread([float(np.interp(budget, c.nfe, c.reward)) for c in runs]),
            spread([c.reward[-1] for c in runs]),
            f"{spread([c.watched[0] for c in runs])} → {spread([c.watched[-1] for c in runs])}",
            spread([reach(c, level, c.nfe) / 1e3 for c in runs], "{:.0f}"),
            spread([reach(c, level, c.seconds) / 60 for c in runs], "{:.1f}"),
        )
        for method, runs in curves.items()
    ]
    return markdown(header, rows)


def main() -> None:
    """Train, print the table and write both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--level", type=float, default=0.6, help="the reward whose cost is reported")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-quickstart"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("overrides", nargs="*", help="key.path=value for every run")
    options = parser.parse_args()
    jobs = [
        Job(method, f"{method}-{seed}", (f"seed={seed}", *options.overrides))
        for seed in options.seeds
        for method in METHODS
    ]
    bench = Bench(options.runs, options.out / "records" / "quickstart")
    found = bench.by_recipe(jobs, options.jobs)
    curves = {name: found[method] for method, name in METHODS.items()}
    text = table(curves, options.level)
    plot_curves(curves, options.out / "quickstart.png")
    (options.out / "quickstart.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
