"""Rewards of images as rewards of videos: frames are scored one by one, and their scores are combined.

    mean        of all frames
    worst       the lowest of all frames
    {sample: k} the mean of k different frames, drawn by a key that is a hash of the video

A video that is drawn again has the same frames scored. Which frames count cannot be known before a video is drawn, so all
must be good. A video is valid if all its scored frames are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from rewards.base import Metadata, Reward, Samples, Scores, check_videos, preload, score
from rewards.combination import mean, worst


@dataclass(frozen=True)
class PerFrame:
    """A reward of images that also scores videos. Images are passed on as they are."""

    reward: Reward
    count: int | None = None
    """Number of frames that are drawn; None for all."""
    worst: bool = False

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"reward '{self.name}': {self.count} sampled frames, expected 1 or more")

    @property
    def name(self) -> str:
        """Name of the reward."""
        return self.reward.name

    @property
    def needs(self) -> tuple[str, ...]:
        """Inputs of the reward, with videos beside images."""
        return tuple(dict.fromkeys(each for need in self.reward.needs for each in _with_videos(need)))

    def to(self, device: torch.device | str) -> PerFrame:
        """Move the reward, and return this object."""
        self.reward.to(device)
        return self

    def preload(self) -> None:
        """Load the reward's model now, if it has one."""
        preload(self.reward)

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W], or videos [B,F,3,H,W] of at least `count` frames."""
        if not isinstance(samples, Tensor) or samples.ndim != 5:
            return score(self.reward, samples, prompts, metadata)
        videos = check_videos(samples, self.name)
        if self.count is not None:
            videos = sample_frames(videos, self.count)
        frames = videos.shape[1]
        rows = [row for row in range(len(videos)) for _ in range(frames)]
        found = score(self.reward, videos.flatten(0, 1), [prompts[i] for i in rows], [metadata[i] for i in rows])
        members = Scores(found.values.view(-1, frames).T, found.valid.view(-1, frames).T)
        return worst(members) if self.worst else mean(members)


def sample_frames(videos: Tensor, count: int) -> Tensor:
    """Return `count` different frames of each of the videos [B,F,3,H,W], in order, drawn by a hash of its 8-bit pixels."""
    frames = videos.shape[1]
    if count > frames:
        raise ValueError(f"{count} sampled frames of a video of {frames}; sample at most {frames}")
    picked = []
    for video in videos:
        key = crc32(video.float().clamp(0, 1).mul(255).round().byte().cpu().numpy().tobytes())
        order = torch.randperm(frames, generator=torch.Generator().manual_seed(key))
        picked.append(video[order[:count].sort().values.to(video.device)])
    return torch.stack(picked) if picked else videos[:, :count]


def spread_frames(videos: Tensor, most: int) -> Tensor:
    """Return at most `most` frames of each of the videos [B,F,3,H,W], evenly spaced from the first to the last."""
    return videos[:, torch.linspace(0, videos.shape[1] - 1, min(most, videos.shape[1])).round().long()]


def _with_videos(need: str) -> tuple[str, ...]:
    return (need, "videos") if need == "images" else (need,)
