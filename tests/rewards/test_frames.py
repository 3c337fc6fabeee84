"""Rewards of images on videos, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import PerFrame, RewardError, Scores, score
from rewards.base import WithoutDevice
from rewards.frames import sample_frames, spread_frames


class Red(WithoutDevice):
    """The red of the first pixel. A frame whose prompt is "blind" at a red of 1 is invalid."""

    name = "red"
    needs: tuple[str, ...] = ("images", "prompts")

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Any) -> Scores:
        assert samples.ndim == 4
        values = samples[:, 0, 0, 0]
        return Scores(
            values, torch.tensor([not (p == "blind" and v == 1) for p, v in zip(prompts, values, strict=True)])
        )


def films(*reds: Sequence[float]) -> Tensor:
    return torch.tensor(reds)[:, :, None, None, None].expand(-1, -1, 3, 2, 2).contiguous()


VIDEOS = films([0.0, 0.5, 1.0], [0.25, 0.25, 0.5])


def test_mean_and_worst_of_frames() -> None:
    assert score(PerFrame(Red()), VIDEOS, ["a", "b"], [{}, {}]).values.tolist() == pytest.approx([0.5, 1 / 3])
    assert score(PerFrame(Red(), worst=True), VIDEOS, ["a", "b"], [{}, {}]).values.tolist() == [0.0, 0.25]
    assert PerFrame(Red()).needs == ("images", "videos", "prompts")


def test_a_video_is_valid_if_all_its_frames_are() -> None:
    found = score(PerFrame(Red()), VIDEOS, ["blind", "blind"], [{}, {}])
    assert found.valid.tolist() == [False, True]


def test_images_are_passed_on() -> None:
    images = VIDEOS[:, 2]
    assert score(PerFrame(Red(), worst=True), images, ["a", "b"], [{}, {}]).values.tolist() == [1.0, 0.5]


def test_sampled_frames_differ_between_videos_and_not_between_calls() -> None:
    videos = torch.rand(40, 6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    picked = sample_frames(videos, 2)
    assert torch.equal(picked, sample_frames(videos.flip(0), 2).flip(0))  # of the video, not of its place
    index = [
        [int((v == frame).flatten(1).all(1).nonzero()) for frame in p] for v, p in zip(videos, picked, strict=True)
    ]
    assert all(first < second for first, second in index)
    assert {frame for pair in index for frame in pair} == set(range(6))
    whole = score(PerFrame(Red(), 6), videos, ["a"] * 40, [{}] * 40).values
    torch.testing.assert_close(whole, videos[:, :, 0, 0, 0].mean(1))
    with pytest.raises(RewardError, match="7 sampled frames of a video of 6; sample at most 6"):
        score(PerFrame(Red(), 7), videos, ["a"] * 40, [{}] * 40)
    with pytest.raises(ValueError, match="0 sampled frames, expected 1 or more"):
        PerFrame(Red(), 0)


def test_evenly_spaced_frames() -> None:
    numbers = torch.arange(9.0).view(1, 9, 1, 1, 1).expand(1, 9, 3, 1, 1)
    assert spread_frames(numbers, 3)[0, :, 0, 0, 0].tolist() == [0, 4, 8]
    assert torch.equal(spread_frames(numbers, 20), numbers)
