"""Videos that are decoded when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.data.videos import Videos
from difrl.scoring import Scorer
from difrl.scoring.diversity import Diversity
from rewards import PerFrame, make
from rewards.base import WithoutDevice


class Film:
    """Videos of constant frames: frame f of source s has the value s / 10 + f / 100. It counts what it decodes."""

    def __init__(self) -> None:
        self.decoded: list[list[float]] = []

    def __call__(self, sources: Sequence[Tensor]) -> Tensor:
        self.decoded.append([float(source) for source in sources])
        values = torch.stack(list(sources))[:, None] / 10 + torch.arange(3) / 100
        return values[..., None, None, None].expand(-1, -1, 3, 4, 4)


def film(count: int = 5, batch: int = 2) -> tuple[Film, Rollout]:
    decode, numbers = Film(), torch.arange(count)
    videos = Videos(tuple(torch.arange(float(count))), decode, batch)
    prompts = tuple(Prompt(f"p{i}", {}) for i in range(count))
    return decode, Rollout(prompts, numbers // 2, numbers, {}).with_content(videos)


class Level(WithoutDevice):
    """The value of the last frame."""

    name, needs = "level", ("videos", "prompts")

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        assert [f"p{round(float(value) * 10)}" for value in samples[:, 0, 0, 0, 0]] == list(prompts)
        return samples[:, -1, 0, 0, 0]


def test_all_rewards_see_the_same_batches_which_are_decoded_once() -> None:
    decode, rollout = film()
    scorer = Scorer.from_rewards({"level": (Level(), 1.0)}, {"size": PerFrame(make("jpeg_compressibility"))})
    scored = scorer(rollout)
    torch.testing.assert_close(scored.rewards, torch.arange(5) / 10 + 0.02)
    assert scored.parts["watch/size"].shape == (5,)
    assert decode.decoded == [[0, 1], [2, 3], [4]]
    assert scored.without_images().rollout.videos is None


def test_selected_parts_concatenate_to_the_whole() -> None:
    decode, rollout = film()
    assert decode.decoded == []
    joined = Rollout.cat([rollout.select(torch.tensor([4, 0])), rollout.select(slice(1, 4)).to("cpu")])
    assert isinstance(joined.content, Videos)
    assert [float(source) for source in joined.content.sources] == [4, 0, 1, 2, 3]
    assert [len(samples) for _, samples in joined.batches()] == [2, 2, 1]
    assert len(joined.content[1:3]) == 2


def test_diversity_of_videos_is_that_of_all_frames() -> None:
    """Neighbours differ by 0.1 in every value of every frame, so their root-mean-square difference is 0.1."""
    _, rollout = film(4)
    found = Diversity()(rollout)["diversity/pixels"]
    torch.testing.assert_close(found, torch.tensor([0.1, 0.1]))


def test_a_rollout_without_samples_has_nothing_to_score() -> None:
    _, rollout = film()
    bare = ScoredRollout(rollout, torch.zeros(5), torch.ones(5, dtype=torch.bool)).without_images().rollout
    with pytest.raises(ValueError, match="no images, videos or texts"):
        list(bare.batches())
