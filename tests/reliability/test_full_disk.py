"""A disk that is full from any write on: the run stops and names its folder, and what was saved is whole."""

from __future__ import annotations

import random
from pathlib import Path

from difrl.training import checkpoint
from tests.reliability.runs import count_events, outcome, start
from tests.reliability.tally import Tally
from tests.training.test_run import CASES, small


def test_a_full_disk_costs_nothing_that_was_saved(tally: Tally, sd3: Path, tmp_path: Path) -> None:
    """With room again, the resumed run ends with the bytes of an undisturbed one."""
    whole = small(sd3, tmp_path / "whole", **CASES["forward"])
    events, expected = count_events(whole), outcome(whole.output_dir)
    chance = random.Random(0)
    for index in tally.trials(short=2, long=60):
        at = chance.randrange(1, events + 1)
        config = small(sd3, tmp_path / f"run-{index}", **CASES["forward"])
        with tally.trial(f"full from event {at} of {events} on"):
            (code,) = start(config, at=[at])
            if code:  # 0: only what is removed at the end failed
                assert code == 1
                message = config.output_dir.with_suffix(".error").read_text()
                assert "No space left on device" in message
                assert str(config.output_dir) in message
                assert "Traceback" not in message
            for place in checkpoint.find_all(config.output_dir):
                checkpoint.check(place)
            assert start(config, resume=True) == [0]
            found = outcome(config.output_dir)
            assert [name for name in expected | found if expected.get(name) != found.get(name)] == []
