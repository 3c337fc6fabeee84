"""Tests of the scoring of rollouts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from difrl.config import RewardConfig
from difrl.config.yaml_source import ConfigError
from difrl.data import modality as modalities
from difrl.data.modality import Modality
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.scoring import SHIPPED_OPTIONS, Scorer, build_reward
from rewards import RewardError, Scores
from rewards import make as find_reward

PROMPTS = tuple(Prompt(text, {"number": n}) for n, text in enumerate(("one", "two", "three")))


@dataclass
class Table:
    """A reward with a value for each prompt. None is a row that it cannot score, whose value must be ignored."""

    values: Mapping[str, float | None]
    name: str = "table"
    needs: tuple[str, ...] = ("images", "prompts", "metadata")

    def __call__(self, samples: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        assert [m["number"] for m in metadata] == [0, 1, 2]
        assert len(samples) == 3
        found = [self.values[p] for p in prompts]
        values = torch.tensor([math.nan if v is None else v for v in found])
        return Scores(values, torch.tensor([v is not None for v in found]))

    def to(self, device: torch.device | str) -> Table:
        return self


def rollout(images: Tensor | None = None, texts: tuple[str, ...] | None = None) -> Rollout:
    return Rollout(PROMPTS, torch.arange(3), torch.arange(3), {}, images, texts)


IMAGES = torch.rand(3, 3, 4, 4)
FULL = Table({"one": 1.0, "two": 2.0, "three": 3.0})
HOLED = Table({"one": None, "two": 10.0, "three": 20.0})


def test_rewards_are_summed_by_weight_and_watched_ones_are_not() -> None:
    scorer = Scorer.from_rewards(
        {"a": (FULL, 2.0), "b": (Table({"one": 5.0, "two": 0.0, "three": -1.0}), -0.5)}, {"c": FULL}
    )
    scored = scorer(rollout(IMAGES))
    assert scored.rewards.tolist() == [2 - 2.5, 4.0, 6.5]
    assert scored.valid.tolist() == [True, True, True]
    assert {name: part.tolist() for name, part in scored.parts.items()} == {
        "reward/a": [1.0, 2.0, 3.0],
        "invalid/a": [0.0, 0.0, 0.0],
        "reward/b": [5.0, 0.0, -1.0],
        "invalid/b": [0.0, 0.0, 0.0],
        "watch/c": [1.0, 2.0, 3.0],
        "invalid/c": [0.0, 0.0, 0.0],
    }


def test_row_that_one_reward_cannot_score_is_not_valid_as_a_whole() -> None:
    scored = Scorer.from_rewards({"a": (FULL, 1.0), "b": (HOLED, 1.0)}, {})(rollout(IMAGES))
    assert scored.valid.tolist() == [False, True, True]
    assert scored.rewards.tolist() == [0.0, 12.0, 23.0]
    assert scored.parts["reward/a"].tolist() == [1.0, 2.0, 3.0]
    assert scored.parts["reward/b"].isnan().tolist() == [True, False, False]
    assert scored.parts["invalid/b"].tolist() == [1.0, 0.0, 0.0]


def test_row_that_a_reward_of_weight_0_cannot_score_stays_valid() -> None:
    scored = Scorer.from_rewards({"a": (FULL, 1.0), "b": (HOLED, 0.0)}, {})(rollout(IMAGES))
    assert scored.valid.all()
    assert scored.rewards.tolist() == [1.0, 2.0, 3.0]
    assert scored.parts["reward/b"].isnan().tolist() == [True, False, False]


def test_row_that_a_watched_reward_cannot_score_stays_valid() -> None:
    scored = Scorer.from_rewards({"a": (FULL, 1.0)}, {"b": HOLED})(rollout(IMAGES))
    assert scored.valid.all()
    assert scored.parts["watch/b"].isnan().tolist() == [True, False, False]


def test_texts_are_scored_where_there_are_no_images() -> None:
    seen: list[Any] = []

    class Spy(Table):
        def __call__(self, samples: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            seen.append(samples)
            return super().__call__(samples, prompts, metadata)

    Scorer.from_rewards({"a": (Spy(FULL.values), 1.0)}, {})(rollout(texts=("x", "y", "z")))
    assert seen == [("x", "y", "z")]
    with pytest.raises(ValueError, match="no images, videos or texts"):
        Scorer.from_rewards({"a": (FULL, 1.0)}, {})(rollout())


def test_broken_reward_is_named_with_the_row() -> None:
    infinite = Table({"one": 1.0, "two": math.inf, "three": 3.0}, name="leaky")
    with pytest.raises(RewardError, match=r"reward 'leaky' failed at row 1 \(prompt 'two'\)"):
        Scorer.from_rewards({"a": (FULL, 1.0)}, {"leaky": infinite})(rollout(IMAGES))


def numbers(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any], *, scale: float = 1.0) -> Tensor:
    """Return the numbers in the metadata; the reward is imported by path."""
    return scale * torch.tensor([float(m["number"]) for m in metadata])


def test_rewards_are_built_from_their_settings() -> None:
    optimised = [
        RewardConfig(name="jpeg_compressibility", weight=0.5),
        RewardConfig.model_validate({"import": "tests.scoring.test_scorer.numbers", "options": {"scale": 3.0}}),
    ]
    scorer = Scorer.build(optimised, [RewardConfig(name="jpeg_incompressibility")], torch.device("cpu"))
    assert list(scorer.optimised) == ["jpeg_compressibility", "numbers"]
    assert list(scorer.watched) == ["jpeg_incompressibility"]
    scored = scorer(rollout(IMAGES))
    assert scored.parts["reward/numbers"].tolist() == [0.0, 3.0, 6.0]
    torch.testing.assert_close(
        scored.rewards, 0.5 * scored.parts["reward/jpeg_compressibility"] + scored.parts["reward/numbers"]
    )
    torch.testing.assert_close(
        scored.parts["watch/jpeg_incompressibility"], -scored.parts["reward/jpeg_compressibility"]
    )


SEES = {"name": "jpeg_compressibility"}
READS = {"name": "format", "options": {"pattern": "1"}}
DOES_NOT_SAY = {"import": "tests.scoring.test_scorer.numbers"}


@pytest.mark.parametrize(
    ("modality", "wrong", "message"),
    [
        (
            modalities.IMAGES,
            READS,
            "{}: it reads texts, and the samples here are images; .* lists the rewards of images",
        ),
        (
            modalities.TEXTS,
            SEES,
            "{}: it reads images and videos, and the samples here are texts; .* lists the rewards of texts",
        ),
    ],
)
def test_rewards_of_another_modality_are_refused(modality: Modality, wrong: dict[str, Any], message: str) -> None:
    """This includes watched rewards and members of ensembles. A function without `needs` passes."""
    right = READS if wrong is SEES else SEES
    pair = {"label": "pair", "ensemble": [{**right, "label": "one"}, {**wrong, "label": "other"}]}
    optimised = [RewardConfig.model_validate(one) for one in (DOES_NOT_SAY, right, pair)]
    watched = [RewardConfig.model_validate({**wrong, "label": "seen"})]
    with pytest.raises(ConfigError) as caught:
        Scorer.build(optimised, watched, "cpu", modality)
    told = caught.value.problems
    assert len(told) == 2
    assert re.search(message.format(r"rewards\.2 \(other\)"), told[0])
    assert re.search(message.format(r"watch\.0 \(seen\)"), told[1])
    Scorer.build(optimised[:2], [], "cpu", modality)


def test_options_of_a_recipe_win_over_the_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, dict[str, Any]]] = []
    built = find_reward("jpeg_compressibility")
    monkeypatch.setattr("rewards.make", lambda name, **options: made.append((name, options)) or built)
    build_reward(RewardConfig(name="judge"))
    build_reward(RewardConfig(name="judge", options={"path": "elsewhere"}))
    assert made == [("judge", dict(SHIPPED_OPTIONS["judge"])), ("judge", {"path": "elsewhere"})]


def test_scored_rows_are_selected_and_joined() -> None:
    scored = Scorer.from_rewards({"a": (FULL, 1.0), "b": (HOLED, 1.0)}, {})(rollout(IMAGES))
    again = type(scored).cat([scored.select(torch.tensor([2, 0])), scored.select(torch.tensor([False, True, False]))])
    assert [p.text for p in again.rollout.prompts] == ["three", "one", "two"]
    assert again.rewards.tolist() == [23.0, 0.0, 12.0]
    assert again.valid.tolist() == [True, False, True]
    assert again.rollout.samples.tolist() == [2, 0, 1]
    assert again.rollout.images is not None
    torch.testing.assert_close(again.rollout.images, IMAGES[[2, 0, 1]])
