"""Rewards that fail in every way: a run of texts ends with the reward's name, or counts its samples as invalid and goes on."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from difrl.training.run import train
from rewards import Failsafe, RewardError, Scores, score
from rewards.base import Metadata, Samples
from rewards.failures import OnError
from tests.reliability.tally import Tally
from tests.texts import prompt_file, shown_recipe

PROMPTS = [f"{one}+{other}=" for one in range(4) for other in range(2)]


def run_out_of_memory() -> None:
    raise MemoryError("cannot allocate 8 TB")


def recurse() -> None:
    recurse()


def allocate_too_much() -> None:
    torch.empty(2**60)


# What a reward returns for B samples, instead of B numbers.
RETURNS: dict[str, Callable[[int], object]] = {
    "NaN": lambda count: [math.nan] * count,
    "one NaN": lambda count: torch.tensor([math.nan] + [1.0] * (count - 1)),
    "inf": lambda count: [math.inf] * count,
    "-inf": lambda count: torch.full((count,), -math.inf),
    "a number beyond float32": lambda count: [1e300] * count,
    "too few": lambda count: [1.0] * (count - 1),
    "too many": lambda count: [1.0] * (count + 1),
    "none": lambda count: [],
    "a matrix": lambda count: torch.ones(count, 2),
    "a scalar": lambda count: torch.tensor(1.0),
    "a number": lambda count: 1.0,
    "nothing": lambda count: None,
    "strings": lambda count: ["1"] * count,
    "a dictionary": lambda count: dict.fromkeys(range(count), 1.0),
    "nested lists": lambda count: [[1.0]] * count,
    "a string": lambda count: "1" * count,
    "complex numbers": lambda count: torch.ones(count, dtype=torch.complex64),
    "scores of another length": lambda count: Scores(torch.ones(count), torch.ones(count + 1, dtype=torch.bool)),
}
# What it does before it returns.
RAISES: dict[str, Callable[[], object]] = {
    "raises KeyError": lambda: {}["weights"],
    "raises OSError": lambda: Path("/no/such/file").read_text(),
    "exits": lambda: sys.exit(3),
    "exits without a code": lambda: sys.exit(),
    "runs out of memory": run_out_of_memory,
    "allocates too much": allocate_too_much,
    "recurses": recurse,
    "raises StopIteration": lambda: next(iter(())),
    "raises an assertion": lambda: (_ for _ in ()).throw(AssertionError()),
}
FAULTS = [*RETURNS, *RAISES]


class Faulty:
    """A reward that fails on the texts of some prompts, or on all."""

    needs = ("texts", "prompts")

    def __init__(self, fault: str, only: str | None = None) -> None:
        self.name, self.fault, self.only = "faulty", fault, only

    def to(self, device: object) -> Faulty:
        return self

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Any:
        if self.only is not None and self.only not in prompts:
            return [float(len(text)) for text in samples]
        if self.fault in RAISES:
            RAISES[self.fault]()
        return RETURNS[self.fault](len(samples))


def call(reward: Any) -> Scores:
    return score(reward, list("abcdefgh"), PROMPTS, [{}] * len(PROMPTS))


def stops(action: Callable[[], object]) -> bool:
    """Whether an action ends with an error that names the reward."""
    try:
        action()
    except RewardError as error:
        return "reward 'faulty' failed" in str(error)
    return False


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_fault_is_an_error_with_the_rewards_name(tally: Tally, timeout: float | None) -> None:
    for fault in FAULTS:
        with tally.trial(fault):
            assert stops(lambda: call(Failsafe(Faulty(fault), timeout=timeout)))  # noqa: B023 called at once


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_dropped_fault_is_an_invalid_row_and_no_other(tally: Tally, timeout: float | None) -> None:
    for fault in FAULTS:
        with tally.trial(fault):
            found = call(Failsafe(Faulty(fault, only=PROMPTS[3]), "drop", timeout=timeout))
            assert found.valid.tolist() == [prompt != PROMPTS[3] for prompt in PROMPTS]
            assert found.values.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


def test_a_reward_that_hangs_is_late(tally: Tally) -> None:
    class Hanging(Faulty):
        def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Any:
            time.sleep(2)
            return [0.0] * len(samples)

    rules: tuple[OnError, ...] = ("raise", "retry", "drop")
    for rule in rules:
        with tally.trial(rule):
            reward = Failsafe(Hanging("hangs"), rule, timeout=0.2, retries=1, sleep=lambda seconds: None)
            if rule == "drop":
                assert not call(reward).valid.any()
            else:
                assert stops(lambda: call(reward))  # noqa: B023 called at once


def test_a_run_stops_with_the_name_or_counts_the_samples(tally: Tally, lm: Path, tmp_path: Path) -> None:
    """A run of two steps in which one prompt of eight cannot be scored, under both rules."""
    prompts = prompt_file(tmp_path, PROMPTS)
    for index in tally.trials(short=3, long=len(FAULTS)):
        fault = FAULTS[index * 7 % len(FAULTS)]
        for rule in ("raise", "drop"):
            folder = tmp_path / f"{index}-{rule}"
            reward = {
                "import": "tests.reliability.test_reward_faults:Faulty",
                "options": {"fault": fault, "only": PROMPTS[0]},
                "on_error": rule,
            }
            config = shown_recipe(
                lm, folder, prompts, rewards=[reward], data={"prompts_per_step": 8}, eval={"every": 0}
            )
            with tally.trial(f"{fault}, {rule}"):
                if rule == "raise":
                    assert stops(lambda: train(config))  # noqa: B023 called at once
                    continue
                train(config)
                rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                steps = [row for row in rows if "loss" in row]
                assert [row["samples/invalid"] for row in steps] == [1 / 8, 1 / 8]
                assert all(math.isfinite(value) for row in steps for value in row.values() if isinstance(value, float))
