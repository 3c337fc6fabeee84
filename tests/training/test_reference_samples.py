"""Scores of reference samples: kept through failures, resumed runs and changes of the number of processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from difrl.data.prompts import Prompt
from difrl.policies.base import NoiseKey
from difrl.runtime.distributed import DistributedContext
from difrl.scoring.reference_samples import ReferenceScores, hash_prompt
from difrl.training import checkpoint
from difrl.training.checkpoint import CheckpointError
from difrl.training.trainer import Trainer
from rewards import RewardError, Scores
from rewards.random_state import get_random_state, set_random_state
from tests.fakes import PROMPTS, Brightness, LinearPolicy, Moody, in_threads
from tests.helpers import without_times
from tests.recipes import recipe
from tests.training.test_shaped_rewards import PAR, Counting, bright, dropping, run, trainer_of

NAN = math.nan


class Failing(Moody):
    """A reward that scores no more than two samples while `down`."""

    down = False

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Any) -> Scores:
        if self.down and len(samples) > 2:
            raise ConnectionError("no answer")
        return super().__call__(samples, prompts, metadata)


class Asked(LinearPolicy):
    """A policy that records the numbers of the prompts whose reference samples were drawn, two each."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def reference(self, prompts: Any, samples: Tensor, key: NoiseKey, snapshot: str) -> Any:
        self.asked.append(int(samples[0]) // 2)
        return super().reference(prompts, samples, key, snapshot)


def moody(processes: DistributedContext | None = None, count: int = 2) -> tuple[Trainer, Asked]:
    """Return a trainer for six steps of four prompts out of ten: every prompt is met twice or three times."""
    policy = Asked()
    reward = {**bright("moody", **PAR), "import": "tests.training.test_reference_samples:Failing"}
    sections = {"references": {"count": count}, "data": {"prompts_per_step": 4, "group_size": 2}, "train": {"steps": 6}}
    return trainer_of([reward], processes, policy=policy, **sections), policy


def resumed(run: Path, step: int) -> tuple[Trainer, Asked]:
    """Return a new trainer that is resumed from a checkpoint, with other random states."""
    trainer, policy = moody()
    torch.manual_seed(99)
    assert checkpoint.load(trainer, checkpoint.checkpoint_folder(run, step), DistributedContext()) == step
    return trainer, policy


def test_a_reward_that_never_says_the_same_twice_is_asked_once_whenever_a_run_is_resumed(tmp_path: Path) -> None:
    """The reward draws from the global random state, so equal bits mean that each sample was scored exactly once."""
    torch.manual_seed(3)
    whole, policy = moody()
    expected = run(whole, 6)
    assert sorted(policy.asked) == list(range(len(PROMPTS)))
    for pause in range(1, 6):
        torch.manual_seed(3)
        first, before = moody()
        run(first, pause)
        checkpoint.save(first, tmp_path, pause, 9, DistributedContext())
        second, after = resumed(tmp_path, pause)
        assert [without_times(second.step(number)) for number in range(pause, 6)] == expected[pause:]
        assert torch.equal(second.parameters[0], whole.parameters[0])
        assert before.asked + after.asked == policy.asked


def test_a_step_that_fails_is_done_again_from_what_was_known_before_it(tmp_path: Path) -> None:
    """The second step meets two new prompts; then the reward is down for the step's own samples."""
    torch.manual_seed(3)
    whole, _ = moody()
    expected = run(whole, 6)
    torch.manual_seed(3)
    first, policy = moody()
    run(first, 1)
    known, generators, asked = first.source.state(), get_random_state(), len(policy.asked)
    term, _ = first.scorer.optimised["moody"]
    failsafe: Any = term.members["moody"].reward
    failsafe.reward.reward.down = True
    with pytest.raises(RewardError, match="no answer"):
        first.step(1)
    assert len(policy.asked) > asked
    assert all(torch.equal(rows, known[name]) for name, rows in first.source.state().items())
    set_random_state(generators)
    checkpoint.save(first, tmp_path, 1, 1, DistributedContext())
    second, _ = resumed(tmp_path, 1)
    assert [without_times(second.step(number)) for number in range(1, 6)] == expected[1:]


def references(prompts: Sequence[Prompt] = PROMPTS, count: int = 3) -> ReferenceScores:
    config = recipe("nowhere", rewards=[bright(**PAR)], references={"count": count}).references
    assert config is not None
    return ReferenceScores(config, 7, LinearPolicy(), {"bright": Brightness()}, prompts, torch.device("cpu"))


def state(met: Mapping[int, int], *scores: list[float]) -> dict[str, Tensor]:
    """Return the state of a process that met these prompts so often."""
    marks = [hash_prompt(PROMPTS[number]) for number in met]
    columns = {"number": list(met), "prompt": marks, "met": list(met.values())}
    return {**{name: torch.tensor(column) for name, column in columns.items()}, "scores/bright": torch.tensor(scores)}


def listed(found: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return the rows as text, so that NaN equals NaN."""
    return {name: rows.tolist() if rows.ndim == 1 else list(map(str, rows.tolist())) for name, rows in found.items()}


def test_a_state_is_what_it_says() -> None:
    """Prompts are met 3 times and twice. Two of three samples of the second prompt have a score, none of the third."""
    told = state({4: 3, 2: 2, 9: 2}, [0.1, -0.0, 3.0], [NAN, 5.0, 6.5], [NAN, NAN, NAN])
    known = references()
    known.load(told)
    assert listed(known.state()) == listed(told)
    known.rewards = {
        "bright": Brightness(factor=NAN)
    }  # which would raise: nothing is due at a third or a fourth meeting
    found = known([4, 9, 4])["bright"]
    assert found.valid.tolist() == [[True] * 3, [False] * 3, [True] * 3]
    assert listed({"r": found.values}) == listed({"r": torch.tensor([[0.1, -0.0, 3.0], [0.0] * 3, [0.1, -0.0, 3.0]])})


def test_nothing_is_known_at_first() -> None:
    empty = references().state()
    assert {name: list(rows.shape) for name, rows in empty.items()} == {
        "number": [0],
        "prompt": [0],
        "met": [0],
        "scores/bright": [0, 3],
    }
    known = references()
    known.load(empty)
    assert listed(known.state()) == listed(empty)


def test_what_several_processes_knew_is_joined() -> None:
    """If two processes scored a sample, the later score counts, and the largest number of meetings."""
    known = references()
    known.load(state({1: 2}, [1.0, NAN, 3.0]))
    known.load(state({2: 1, 1: 3}, [NAN, NAN, NAN], [4.0, 5.0, NAN]))
    assert listed(known.state()) == listed(state({1: 3, 2: 1}, [4.0, 5.0, 3.0], [NAN, NAN, NAN]))


@pytest.mark.parametrize("other", [{"text": "another"}, {"negative": "grey"}, {"metadata": {"answer": 1}}])
def test_a_prompt_that_says_something_else_than_it_did_was_never_met(other: dict[str, Any]) -> None:
    """The same holds for a prompt that is gone. The weight of a prompt and its place in the file do not matter."""
    prompts = [PROMPTS[0], replace(PROMPTS[1], **other), replace(PROMPTS[2], weight=2.0, place="elsewhere")]
    known = references(prompts)
    known.load(state({1: 2, 2: 2, 5: 2}, [1.0] * 3, [2.0] * 3, [5.0] * 3))
    assert listed(known.state()) == listed(state({2: 2}, [2.0] * 3))


def test_when_to_try_again_is_not_forgotten() -> None:
    """Of 20 meetings, the reward is tried at 1 and 2, and, after a checkpoint at the third, at 4, 8 and 16."""
    policy = Counting()
    broken, first = dropping(2, policy)
    broken.down = lambda samples: True
    for _ in range(3):
        first([5])
        first.commit_step()
    assert policy.drawn == 2
    policy = Counting()
    broken, second = dropping(2, policy)
    broken.down = lambda samples: True
    second.load(first.state())
    tried = []
    for meeting in range(4, 21):
        before = policy.drawn
        second([5])
        tried += [meeting] * (policy.drawn - before)
    assert tried == [4, 8, 16]


def train_on(count: int, place: Path, start: int, stop: int) -> list[list[int]]:
    """Train some steps on several processes, and save the last. Return the prompts whose references each has drawn."""

    def work(processes: DistributedContext) -> list[int]:
        trainer, policy = moody(processes)
        if start:
            checkpoint.load(trainer, checkpoint.checkpoint_folder(place, start), processes)
        for number in range(start, stop):
            trainer.step(number)
        checkpoint.save(trainer, place, stop, 9, processes)
        return policy.asked

    return in_threads(count, work)


def test_a_process_does_not_ask_again_for_what_it_knew(tmp_path: Path) -> None:
    """Each of two processes draws references for its own prompts once, resumed or not; a single process then draws no more."""
    whole = train_on(2, tmp_path / "whole", 0, 5)
    first, second = train_on(2, tmp_path / "run", 0, 3), train_on(2, tmp_path / "run", 3, 5)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert [len(asked) for asked in whole] == [len(set(asked)) for asked in whole]
    known = set(whole[0]) | set(whole[1])
    assert known == set(range(len(PROMPTS)))
    assert train_on(1, tmp_path / "run", 5, 6) == [[]]
    assert train_on(4, tmp_path / "run", 5, 6) == [[]] * 4


def test_another_number_of_references_is_refused(tmp_path: Path) -> None:
    checkpoint.save(moody()[0], tmp_path, 0, 1, DistributedContext())
    with pytest.raises(CheckpointError, match=r"holds .*scores/moody \[2\] and this run needs .*scores/moody \[3\]"):
        checkpoint.load(moody(count=3)[0], checkpoint.checkpoint_folder(tmp_path, 0), DistributedContext())
