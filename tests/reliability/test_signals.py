"""Polite signals at any moment, once and twice, and an output whose reader has gone."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from difrl.config.load import to_yaml
from difrl.training import checkpoint
from difrl.training.interrupts import SIGNALS
from tests.reliability.runs import count_events, outcome, start
from tests.reliability.tally import Tally
from tests.training.test_run import CASES, small


def test_a_signal_loses_nothing(tally: Tally, sd3: Path, tmp_path: Path) -> None:
    """Once: the step is saved. Twice, the second time soon after: the run ends at once, in the middle of a save too."""
    whole = small(sd3, tmp_path / "whole", **CASES["forward"])
    events, expected = count_events(whole), outcome(whole.output_dir)
    chance = random.Random(0)
    for index in tally.trials(short=3, long=60):
        number, at, twice = SIGNALS[index % len(SIGNALS)], chance.randrange(1, events + 1), chance.random() < 0.5
        config = small(sd3, tmp_path / f"run-{index}", **CASES["forward"])
        with tally.trial(f"signal {number.name} at event {at} of {events}{', twice' * twice}"):
            (code,) = start(config, at=[at, at + chance.randrange(1, 6)] if twice else [at], number=number)
            # Before and after the loop of steps, where there is nothing to save, the system's own reaction ends the process.
            assert code in (0, 130, -number)
            for place in checkpoint.find_all(config.output_dir):
                checkpoint.check(place)
            assert start(config, resume=True) == [0]
            found = outcome(config.output_dir)
            assert [name for name in expected | found if expected.get(name) != found.get(name)] == []


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_output(tally: Tally, sd3: Path, tmp_path: Path) -> None:
    """`difrl train RECIPE | head -1`: the run goes on to its end, and ends well."""
    for index in tally.trials(short=1, long=3):
        config = small(sd3, tmp_path / f"run-{index}", **CASES["forward"])
        path = tmp_path / f"run-{index}.yaml"
        path.write_text(to_yaml(config))
        command = [sys.executable, "-c", "from difrl.cli import main; main()", "train", str(path)]
        with tally.trial(f"run {index}"):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline()
            process.stdout.close()
            errors = process.stderr.read()
            assert process.wait() == 0, errors
            assert "BrokenPipe" not in errors
            assert (config.output_dir / "summary.json").is_file()
