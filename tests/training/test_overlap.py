"""Scoring in a thread while the next samples are drawn."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from difrl.config import RewardConfig
from difrl.core import DynamicSampling
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.policies.base import NoiseKey
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.rollout_source import PolicyRollouts
from difrl.training.trainer import Trainer
from rewards import Failsafe, RewardError, Scores
from tests.fakes import Brightness, LinearPolicy, in_threads, linear_trainer

NOISE = {"kernel": "flow_sde", "noise_level": 0.5}
PLAIN = {**NOISE, "batch": 4}
OVERLAP = {**PLAIN, "overlap": True}
DATA = {"prompts_per_step": 4, "group_size": 2}


def drawn(trainer: Trainer, groups: Sequence[int]) -> ScoredRollout:
    return trainer.source.draw(0, 0, groups, lambda name: None)


@pytest.mark.parametrize("batch", [1, 3, 4, 100])
def test_the_same_samples_get_the_same_rewards(batch: int) -> None:
    plain = drawn(linear_trainer(data=DATA), [3, 0, 1, 2])
    found = drawn(linear_trainer(data=DATA, rollout={**OVERLAP, "batch": batch}), [3, 0, 1, 2])
    assert torch.equal(found.rewards, plain.rewards)
    assert torch.equal(found.groups, plain.groups)
    assert torch.equal(found.rollout.samples, plain.rollout.samples)
    assert found.rollout.prompts == plain.rollout.prompts
    assert all(torch.equal(found.parts[name], plain.parts[name]) for name in plain.parts)


def test_parts_are_whole_groups_of_a_batch_at_most() -> None:
    sizes: list[int] = []

    class Counting(LinearPolicy):
        def rollout(self, prompts: Any, groups: Tensor, samples: Tensor, key: NoiseKey) -> Rollout:
            sizes.append(len(samples))
            return super().rollout(prompts, groups, samples, key)

    data = {"prompts_per_step": 5, "group_size": 3}
    trainer = linear_trainer(policy=Counting(), data=data, rollout={**OVERLAP, "batch": 7})
    drawn(trainer, range(5))
    assert sizes == [6, 6, 3]


@dataclass
class Handshake(Brightness):
    """A reward that scores its first batch only once the second one is being drawn."""

    drawing: threading.Event = field(default_factory=threading.Event)
    threads: set[str] = field(default_factory=set)

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        assert self.drawing.wait(30), "the next batch was not drawn meanwhile"
        self.threads.add(threading.current_thread().name)
        return super().__call__(samples, prompts, metadata)


class Signalling(LinearPolicy):
    """A policy whose reward scores its first batch only once the second one is being drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.reward, self.calls = Handshake(), 0

    def rollout(self, prompts: Any, groups: Tensor, samples: Tensor, key: NoiseKey) -> Rollout:
        self.calls += 1
        if self.calls == 2:
            self.reward.drawing.set()
        return super().rollout(prompts, groups, samples, key)


@pytest.mark.parametrize("count", [1, 2])
def test_drawing_goes_on_while_a_reward_works(count: int) -> None:
    """In each of several processes, with its own samples."""

    def work(processes: DistributedContext) -> set[str]:
        policy = Signalling()
        scorer = Scorer.from_rewards({"handshake": (policy.reward, 1.0)}, {})
        rollout = {**OVERLAP, "batch": 4 // count}
        trainer = linear_trainer(policy=policy, scorer=scorer, processes=processes, data=DATA, rollout=rollout)
        trainer.step(0)
        assert policy.calls == 2
        return policy.reward.threads

    assert in_threads(count, work) == [{"scoring_0"}] * count


def test_training_learns_the_same() -> None:
    """The same holds if groups are drawn again, and on two processes."""
    rows, weights = [], []
    for rollout in (PLAIN, OVERLAP):
        trainer = linear_trainer(data=DATA, rollout=rollout, collect={"max_draws": 2})
        assert isinstance(trainer.source, PolicyRollouts)
        assert isinstance(trainer.collect, DynamicSampling)
        rows.append({k: v for k, v in trainer.step(0).items() if not k.startswith("time/")})
        weights.append(trainer.policy.parameters["weight"].detach().clone())
    assert rows[0] == rows[1]
    assert torch.equal(*weights)

    def shared(processes: Any) -> Tensor:
        trainer = linear_trainer(processes=processes, data=DATA, rollout=OVERLAP)
        trainer.step(0)
        return trainer.policy.parameters["weight"].detach().clone()

    alone = linear_trainer(data=DATA)
    alone.step(0)
    for weight in in_threads(2, shared):
        torch.testing.assert_close(weight, alone.policy.parameters["weight"].detach(), rtol=1e-9, atol=1e-9)


class Breaking(Brightness):
    """A reward that cannot read dark images."""

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        if bool((samples.mean((1, 2, 3)) < 0.45).any()):
            raise OSError("cannot read it")
        return super().__call__(samples, prompts, metadata)


def test_a_reward_that_breaks_in_the_thread_stops_the_step() -> None:
    trainer = linear_trainer(scorer=Scorer.from_rewards({"b": (Breaking(), 1.0)}, {}), data=DATA, rollout=OVERLAP)
    before = trainer.policy.parameters["weight"].detach().clone()
    with pytest.raises(RewardError, match="cannot read it"):
        trainer.step(0)
    assert torch.equal(trainer.policy.parameters["weight"], before)


@pytest.mark.parametrize("rollout", [PLAIN, OVERLAP])
def test_dropped_samples_are_outside_their_groups_baseline_and_counted(rollout: Mapping[str, Any]) -> None:
    """The step equals that of a reward which declares these rows invalid."""
    dark = Brightness(fails=lambda images: images.mean((1, 2, 3)) < 0.45)
    rows, weights = [], []
    for reward in (dark, Failsafe(Breaking(), "drop")):
        trainer = linear_trainer(scorer=Scorer.from_rewards({"b": (reward, 1.0)}, {}), data=DATA, rollout=rollout)
        rows.append({k: v for k, v in trainer.step(0).items() if not k.startswith("time/")})
        weights.append(trainer.policy.parameters["weight"].detach().clone())
    assert 0 < rows[0]["invalid/b"] == rows[0]["samples/invalid"] < 1
    assert rows[0] == rows[1]
    assert torch.equal(*weights)


def test_references_are_drawn_before_and_compared_with_in_the_thread() -> None:
    """Rewards and the number of evaluations equal those of drawing and scoring one after the other."""
    rewards = [{"import": "tests.fakes:Brightness", "label": "brightness", "shape": {"kind": "par"}}]
    rows, evaluations = [], []
    for rollout in (PLAIN, OVERLAP):
        config = {"rewards": rewards, "references": {"count": 3}}
        trainer = linear_trainer(data=DATA, rollout=rollout, scorer=shaped(rewards), **config)
        rows.append({k: v for k, v in trainer.step(0).items() if not k.startswith("time/")})
        evaluations.append(trainer.evaluations)
    assert rows[0] == rows[1]
    assert 0 < rows[0]["shaped/brightness"] < 1
    assert evaluations[0] == evaluations[1]


def shaped(rewards: Sequence[Mapping[str, Any]]) -> Scorer:
    """Return the rewards of a recipe's samples."""
    return Scorer.build([RewardConfig.model_validate(one) for one in rewards], [], torch.device("cpu"))
