"""Metrics on evaluation prompts, by hand, and alike on any number of processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from difrl.core.groups import mean_and_stderr
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.policies.base import TRAINED, GuidanceSettings
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.evaluation import Evaluator
from tests.fakes import Brightness, LinearPolicy, Listed, in_threads

PROMPTS = [Prompt(f"prompt {i}", {}) for i in range(3)]
BRIGHTNESS = Scorer.from_rewards({"brightness": (Brightness(), 1.0)}, {"watched": Brightness(2.0)})


def evaluator(scorer: Any = BRIGHTNESS, policy: Any = None, processes: DistributedContext | None = None) -> Evaluator:
    return Evaluator(
        LinearPolicy() if policy is None else policy, scorer, PROMPTS, processes or DistributedContext(), 5
    )


def test_mean_and_stderr_of_what_could_be_scored() -> None:
    """(1, 2, 6): mean 3, variance (4 + 1 + 9) / 2 = 7, standard error √(7/3)."""
    mean, stderr = mean_and_stderr(torch.tensor([1.0, math.nan, 2.0, 6.0]))
    assert mean == 3.0
    assert stderr == pytest.approx(math.sqrt(7 / 3))
    assert math.isnan(mean_and_stderr(torch.tensor([4.0]))[1])
    assert all(math.isnan(x) for x in mean_and_stderr(torch.tensor([math.nan])))


def test_metrics_by_hand() -> None:
    """The invalid row is in no mean; Listed leaves it in its own part."""
    rewards = {0: 1.0, 1: 2.0, 2: None, 3: 6.0}
    found = evaluator(Listed(rewards))(4)
    assert found["eval/reward/mean"] == 3.0
    assert found["eval/reward/mean/stderr"] == pytest.approx(math.sqrt(7 / 3))
    assert found["eval/reward/listed"] == 9 / 4
    assert found.keys() == {
        f"eval/{name}{end}" for name in ("reward/mean", "reward/listed", "diversity/pixels") for end in ("", "/stderr")
    }


def test_prompts_are_taken_in_turn_with_noise_of_their_own() -> None:
    seen: list[Rollout] = []

    def scorer(rollout: Rollout) -> Any:
        seen.append(rollout)
        return BRIGHTNESS(rollout)

    evaluator(scorer)(5)
    assert [p.text for p in seen[0].prompts] == [f"prompt {i}" for i in (0, 1, 2, 0, 1)]
    assert seen[0].samples.tolist() == [0, 1, 2, 3, 4]


def test_every_evaluation_uses_the_same_noise() -> None:
    """The difference between two evaluations is then due to the weights alone, at every sample."""
    policy = LinearPolicy()
    one = evaluator(policy=policy)
    first = one(7)
    assert one(7) == first
    with torch.no_grad():
        policy.weight.add_(0.5)
    assert one(7) != first
    assert one(7, GuidanceSettings(0.0)) == evaluator()(7, GuidanceSettings(0.0))  # of the base, whatever was trained


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("images", [1, 2, 7, 12])
def test_processes_do_not_matter(count: int, images: int) -> None:
    """No sample counts twice, even if the processes cannot share the samples equally."""
    alone = evaluator()(images)
    for found in in_threads(count, lambda processes: evaluator(processes=processes)(images)):
        assert found == pytest.approx(alone, rel=1e-9, nan_ok=True)


def test_diversity_is_of_the_samples_of_a_prompt() -> None:
    """Each image has one grey, and the distance of two is the difference of their greys."""

    class Greys(LinearPolicy):
        def evaluation(
            self, prompts: Any, samples: torch.Tensor, key: Any, guidance: GuidanceSettings = TRAINED
        ) -> Rollout:
            grey = torch.tensor([0.0, 0.5, 0.1, 0.3, 0.5, 0.2, 0.9])[samples]
            images = grey[:, None, None, None].expand(-1, 3, 4, 4)
            return Rollout(tuple(prompts), samples, samples, {}, images)

    found = evaluator(policy=Greys())(7)
    # prompt 0: greys 0, 0.3, 0.9 with distances 0.3, 0.9, 0.6; prompt 1: 0.5, 0.5; prompt 2: 0.1, 0.2
    means = [0.6, 0.0, 0.1]
    assert found["eval/diversity/pixels"] == pytest.approx(sum(means) / 3, rel=1e-5)
    spread = torch.tensor(means).std() / 3**0.5
    assert found["eval/diversity/pixels/stderr"] == pytest.approx(float(spread), rel=1e-5)
    # Three images of three prompts would have no pair, so one prompt is asked thrice: greys 0, 0.5, 0.1.
    assert evaluator(policy=Greys())(3)["eval/diversity/pixels"] == pytest.approx(1 / 3, rel=1e-5)
    assert "eval/diversity/pixels" not in evaluator(policy=Greys())(1)


def test_grid_shows_the_same_samples_of_prompts_from_the_whole_set() -> None:
    policy = LinearPolicy()
    one = Evaluator(policy, BRIGHTNESS, [Prompt(str(i), {}) for i in range(10)], DistributedContext(), 5)
    rollout, captions = one.draw_grid(3, 2)
    assert captions == ["0", "3", "6"]
    assert [p.text for p in rollout.prompts] == ["0", "0", "3", "3", "6", "6"]
    again, _ = one.draw_grid(3, 2)
    assert rollout.images is not None
    assert again.images is not None
    assert torch.equal(rollout.images, again.images)
    assert len({tuple(image.flatten().tolist()) for image in rollout.images}) == 6
    assert one.draw_grid(99, 1)[1] == [str(i) for i in range(10)]
