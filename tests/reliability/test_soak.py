"""A long run whose reward server comes and goes: every step is there, and nothing piles up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from difrl.reporting.metrics_file import read_metrics
from difrl.reporting.terminal import SilentDisplay
from difrl.training import checkpoint
from difrl.training import run as running
from tests.recipes import text_recipe
from tests.reliability.flapping_server import Flapping, flapping_server
from tests.reliability.tally import Tally
from tests.texts import prompt_file

SETTLED = 0.4
"""Part of a run after which nothing may grow. Before it, allocators and caches fill."""
GROWTH = 16 * 2**20
"""Bytes that the peak of the last part of a run may be above that of the part before it."""
EVERY = 5
"""Steps between evaluations, and between checkpoints."""


@dataclass
class Usage:
    """Resources of this process after a step."""

    files: int
    threads: int
    memory: int


@dataclass
class Meter(SilentDisplay):
    """A display that measures the process after every step, and then sends the server away at some of them."""

    server: Flapping
    flap_every: int
    process: psutil.Process = field(default_factory=psutil.Process)
    usage: dict[int, Usage] = field(default_factory=dict)

    def step(self, metrics: Mapping[str, float]) -> None:
        step = int(metrics["step"])
        self.usage[step] = Usage(self.process.num_fds(), self.process.num_threads(), self.process.memory_info().rss)
        if step % self.flap_every == 0:
            self.server.flap()


def test_a_long_run_loses_no_step_and_holds_no_more_at_its_end(tally: Tally, lm: Path, tmp_path: Path) -> None:
    """The server is away for 0.3 s at every seventh step, before an evaluation at every 35th. Its requests are repeated."""
    steps = len(tally.trials(short=21, long=2000))
    prompts = str(prompt_file(tmp_path))
    with flapping_server() as server:
        config = text_recipe(
            lm,
            tmp_path / "run",
            data={"train": prompts, "evaluation": prompts, "prompts_per_step": 4, "group_size": 3},
            rewards=[{"name": "remote", "options": {"url": server.address, "reward": "ones"}}],
            train={"steps": steps},
            eval={"every": EVERY, "images": 6, "show": 1, "columns": 1},
            checkpoint={"every": EVERY, "keep": 2},
        )
        meter = Meter(server, flap_every=7)
        running.train(config, display=meter)
    rows = {int(row["step"]): row for row in read_metrics(tmp_path / "run")}
    settled = math.ceil(SETTLED * steps)
    early = [usage for step, usage in meter.usage.items() if settled <= step < (steps + settled) / 2]
    limits = Usage(
        max(usage.files for usage in early),
        max(usage.threads for usage in early),
        max(u.memory for u in early) + GROWTH,
    )
    for step in range(1, steps + 1):
        with tally.trial(f"step {step}"):
            assert math.isfinite(rows[step]["reward/mean"]), "no reward"
            assert rows[step]["samples/invalid"] == 0, "a sample without a reward"
            assert ("eval/reward/mean" in rows[step]) == (step % EVERY == 0 or step == steps), "evaluations"
            if step >= settled:
                found = meter.usage[step]
                assert found.files <= limits.files, f"{found.files} open files, {limits.files} before"
                assert found.threads <= limits.threads, f"{found.threads} threads, {limits.threads} before"
                assert found.memory <= limits.memory, f"{found.memory >> 20} MiB, at most {limits.memory >> 20} before"
    with tally.trial("the result"):
        assert list(rows) == list(range(steps + 1))
        kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
        assert len(kept) == 2
        newest = checkpoint.find_latest(tmp_path / "run")
        assert newest is not None
        assert newest.name == f"step-{steps:06d}"
