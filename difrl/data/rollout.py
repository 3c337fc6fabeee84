"""Records that are passed from sampling to learning: prompts with samples, and these with their scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from difrl.data.prompts import Prompt
from difrl.data.videos import Videos

Content = Tensor | Videos | Sequence[str]
"""Samples of a policy: images [B, 3, H, W] in [0, 1], B videos or B texts."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """B samples of a policy or of a file. Only the policy that made the replay data reads them."""

    prompts: tuple[Prompt, ...]
    groups: Tensor
    """[B] int64. Samples with the same number are compared with each other."""
    samples: Tensor
    """[B] int64, the sample's number in its step over all processes. It is part of the key of its noise."""
    replay_data: Mapping[str, Tensor]
    """Tensors [B, ...] that the policy needs to evaluate these samples again."""
    images: Tensor | None = None
    """[B, 3, H, W] in [0, 1]."""
    texts: tuple[str, ...] | None = None
    videos: Videos | None = None
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    """Metrics [B] of the sampling itself, by name."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def content(self) -> Content:
        """The images, videos or texts."""
        for content in (self.images, self.videos, self.texts):
            if content is not None:
                return content
        raise ValueError("the rollout has no images, videos or texts, so there is nothing to score")

    def batches(self) -> Iterator[tuple[slice, Tensor | Sequence[str]]]:
        """Yield rows with their content as rewards score it: all images or texts, or videos [b, F, 3, H, W] by batches."""
        content = self.content
        if isinstance(content, Videos):
            yield from content.batches()
        else:
            yield slice(0, len(self)), content

    def with_content(self, content: Content) -> Rollout:
        """Return the rollout with these samples."""
        if isinstance(content, Tensor):
            return replace(self, images=content)
        if isinstance(content, Videos):
            return replace(self, videos=content)
        return replace(self, texts=tuple(content))

    @property
    def prompt_texts(self) -> list[str]:
        return [p.text for p in self.prompts]

    @property
    def metadata(self) -> list[Mapping[str, Any]]:
        """The prompts' metadata, with the paths of the input image and its mask under `image` and `mask`."""
        return [{**p.metadata, **{key: str(path) for key, path in p.files.items()}} for p in self.prompts]

    def select(self, index: Tensor | slice) -> Rollout:
        """Return the rows of an integer or boolean index [·], or of a slice. The tensors of a slice are views."""
        numbers = torch.arange(len(self))[index if isinstance(index, slice) else index.cpu()].tolist()
        rows = index if isinstance(index, slice) else numbers
        return Rollout(
            prompts=tuple(self.prompts[i] for i in numbers),
            groups=self.groups[rows],
            samples=self.samples[rows],
            replay_data={name: value[rows] for name, value in self.replay_data.items()},
            images=None if self.images is None else self.images[rows],
            texts=None if self.texts is None else tuple(self.texts[i] for i in numbers),
            videos=None if self.videos is None else self.videos.select(numbers),
            measures={name: value[rows] for name, value in self.measures.items()},
        )

    @classmethod
    def cat(cls, parts: Sequence[Rollout]) -> Rollout:
        """Concatenate the rows of the parts."""
        images = [p.images for p in parts if p.images is not None]
        videos = [p.videos for p in parts if p.videos is not None]
        texts = [t for p in parts if p.texts is not None for t in p.texts]
        return cls(
            prompts=tuple(prompt for p in parts for prompt in p.prompts),
            groups=torch.cat([p.groups for p in parts]),
            samples=torch.cat([p.samples for p in parts]),
            replay_data={name: torch.cat([p.replay_data[name] for p in parts]) for name in parts[0].replay_data},
            images=torch.cat(images) if images else None,
            texts=tuple(texts) if texts else None,
            videos=Videos.cat(videos) if videos else None,
            measures={name: torch.cat([p.measures[name] for p in parts]) for name in parts[0].measures},
        )

    def to(self, device: torch.device | str) -> Rollout:
        """Return the rollout with every tensor on a device."""
        return replace(
            self,
            groups=self.groups.to(device),
            samples=self.samples.to(device),
            replay_data={name: value.to(device) for name, value in self.replay_data.items()},
            images=None if self.images is None else self.images.to(device),
            videos=None if self.videos is None else self.videos.to(device),
            measures={name: value.to(device) for name, value in self.measures.items()},
        )


@dataclass(frozen=True, eq=False)
class ScoredRollout:
    """A rollout with its rewards."""

    rollout: Rollout
    rewards: Tensor
    """[B], the weighted sum that is optimised."""
    valid: Tensor
    """[B] bool. False where a reward could not score the sample, which is then in no statistic and in no loss."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Metrics [B] by name, such as reward/NAME and watch/NAME without weights."""

    def __len__(self) -> int:
        return len(self.rollout)

    @property
    def groups(self) -> Tensor:
        return self.rollout.groups

    def without_images(self) -> ScoredRollout:
        """Return the rollout without images and videos. A policy evaluates samples by their replay data."""
        return replace(self, rollout=replace(self.rollout, images=None, videos=None))

    def select(self, index: Tensor | slice) -> ScoredRollout:
        return ScoredRollout(
            self.rollout.select(index),
            self.rewards[index],
            self.valid[index],
            {name: value[index] for name, value in self.parts.items()},
        )

    @classmethod
    def cat(cls, parts: Sequence[ScoredRollout]) -> ScoredRollout:
        return cls(
            Rollout.cat([p.rollout for p in parts]),
            torch.cat([p.rewards for p in parts]),
            torch.cat([p.valid for p in parts]),
            {name: torch.cat([p.parts[name] for p in parts]) for name in parts[0].parts},
        )
