"""Models of rewards: a path that does not exist is refused when the reward is built, and loading does not wait for a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rewards
from rewards import Failsafe, RewardError
from rewards.base import Preloadable, WithoutDevice, preload
from rewards.judge import Judge
from rewards.sources import check_sources
from tests.tiny_clip import tiny_clip

SOURCES = [
    ("clip_score", "model"),
    ("pickscore", "model"),
    ("pickscore", "processor"),
    ("aesthetic", "model"),
    ("aesthetic", "head"),
    ("hpsv2", "weights"),
    ("image_reward", "weights"),
    ("image_reward", "tokenizer"),
    ("reward_model", "model"),
    ("geneval", "detector"),
]


class Lazy(WithoutDevice):
    """A reward that loads, and draws while it does."""

    name, needs = "lazy", ("texts",)

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.loaded = fails, 0

    def preload(self) -> None:
        torch.rand(3)
        if self.fails:
            raise OSError("no such weights")
        self.loaded += 1

    def __call__(self, samples: Any, prompts: Any, metadata: Any) -> list[float]:
        return [0.0] * len(samples)


@pytest.mark.parametrize(("reward", "option"), SOURCES)
@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "~/nowhere", "no folder", "a/b/c", ""])
def test_a_path_that_does_not_exist_is_refused_when_the_reward_is_built(reward: str, option: str, path: str) -> None:
    with pytest.raises(ValueError, match=rf"reward '{reward}': {option}: there is no file or folder '{path}'"):
        rewards.make(reward, **{option: path})


@pytest.mark.parametrize(("reward", "option"), SOURCES)
def test_a_hub_id_or_an_existing_place_is_accepted(reward: str, option: str, tmp_path: Path) -> None:
    for source in ("owner/na-me_1.5", str(tmp_path)):
        assert isinstance(rewards.make(reward, **{option: source}), Preloadable)
        check_sources(reward, **{option: source})


def test_the_judges_folder_is_looked_for_when_it_is_built(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not the folder of a judge"):
        Judge(tmp_path)


def test_preloading_loads_once_and_leaves_the_random_states(tmp_path: Path) -> None:
    reward, state = Lazy(), torch.get_rng_state()
    Failsafe(reward).preload()
    assert reward.loaded == 1
    assert torch.equal(torch.get_rng_state(), state)
    preload(rewards.make("jpeg_compressibility"))  # it has nothing to load
    clip = rewards.make("clip_score", model=str(tiny_clip(tmp_path / "clip")))
    preload(clip)
    encoder = clip.encoder  # type: ignore[attr-defined]
    clip(torch.rand(1, 3, 8, 8), ["a"], [{}])
    assert clip.encoder is encoder  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", ["raise", "retry", "drop"])
def test_a_model_that_cannot_be_loaded_has_the_rewards_name(rule: Any) -> None:
    """Whatever the rule for failed calls: no sample could be scored."""
    with pytest.raises(RewardError, match="reward 'lazy' failed: OSError: no such weights"):
        Failsafe(Lazy(fails=True), rule).preload()


def test_a_folder_that_is_no_model_fails_before_a_sample(tmp_path: Path) -> None:
    for name, options in (
        ("clip_score", {"model": str(tmp_path)}),
        ("image_reward", {"weights": str(tmp_path)}),
        ("reward_model", {"model": str(tmp_path)}),
        ("hpsv2", {"weights": str(tmp_path)}),
        ("geneval", {"detector": str(tmp_path)}),
    ):
        with pytest.raises(RewardError, match=f"reward '{name}' failed"):
            preload(rewards.make(name, **options))
