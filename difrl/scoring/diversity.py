"""Diversity: how much the samples of one prompt differ from each other. Falling diversity is the first sign of collapse.

    d_g = mean over pairs i < j of group g of ‖f(x_i) − f(x_j)‖ / √D     f: images or texts → features of D dimensions

A group of one sample has no diversity. The metric is the mean of d_g over prompts, with its standard error over prompts.
Its unit depends on the feature: for `pixels` it is the root-mean-square difference of a colour value in [0, 1] between
thumbnails; for `ngrams` it is a number from 0 (equal texts) to 1 (no three letters in common). Pixels detect samples with
the same layout and colours. A learned feature (`judge`, or CLIP's by import path) detects samples with the same content.
The features of a video are those of its frames, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

from difrl.config.yaml_source import ConfigError
from difrl.core import group_index
from difrl.data.rollout import Rollout
from difrl.runtime.paths import PACKAGE
from rewards.judge import JudgeNetwork
from rewards.random_state import FirstCall
from rewards.user_code import import_object

THUMBNAIL = 16
BUCKETS = 1024
"""Number of dimensions of `ngrams`. 3-grams in the same bucket count as equal."""

Feature = Callable[[Any], Tensor]
"""A function from images [B, 3, H, W] in [0, 1], or from B texts, to features [B, D]. Those of images are on their device.

Features of a sample do not depend on the other samples.
"""


def thumbnails(images: Tensor) -> Tensor:
    """Return images [B, 3, H, W] averaged down to [B, 3 · 16 · 16], the feature `pixels`."""
    return F.adaptive_avg_pool2d(images.float(), THUMBNAIL).flatten(1)


def mean_distances(features: Tensor, groups: Tensor) -> Tensor:
    """Return the mean root-mean-square distance of two samples, for every group of two or more, in the order of ids.

    Args:
      features: [B, D].
      groups: [B] ids.
    """
    index, number = group_index(groups)
    members = [features[index == group] for group in range(number)]
    # pdist computes differences. Distances by matrix products would be about 1e-3 for equal samples.
    distances = [torch.pdist(group).mean() for group in members if len(group) > 1]
    means: Tensor = (torch.stack(distances) if distances else features.new_zeros(0)) / features.shape[1] ** 0.5
    return means


@cache
def _load_judge() -> JudgeNetwork:
    return JudgeNetwork.load(PACKAGE / "assets" / "judge")


def judge_features(images: Tensor) -> Tensor:
    """Return features [B, 144] of images by the shipped judge of the shapes task."""
    return _load_judge().to(images.device).features(images.float())


@lru_cache(65536)
def _bucket(gram: str) -> int:
    return crc32(gram.encode(errors="surrogatepass")) % BUCKETS  # the same in every process; Python's hash is not


def ngrams(texts: Sequence[str]) -> Tensor:
    """Return the counts of character 3-grams of B texts, hashed into [B, 1024] and scaled to a norm of √(1024 / 2).

    The distance of two texts is then √(1 − cos). Beginning and end count as characters, so that texts with fewer than
    three characters have 3-grams too.
    """
    counts = torch.zeros(len(texts), BUCKETS)
    for row, text in zip(counts, texts, strict=True):
        marked = f"\x02\x02{text}\x03"
        buckets = torch.tensor([_bucket(marked[i : i + 3]) for i in range(len(marked) - 2)])
        row += buckets.bincount(minlength=BUCKETS)
    normalised: Tensor = F.normalize(counts, dim=1) * (BUCKETS / 2) ** 0.5
    return normalised


IMAGE_FEATURES: Mapping[str, Feature] = {"pixels": thumbnails, "judge": judge_features}
TEXT_FEATURES: Mapping[str, Feature] = {"ngrams": ngrams}
FEATURES = (*IMAGE_FEATURES, *TEXT_FEATURES)
EXPECTED = f"expected {', '.join(FEATURES)}, or module:function"


@dataclass(frozen=True)
class Diversity:
    """Diversity within groups, by every feature of a recipe that matches the policy's modality."""

    of_images: Mapping[str, Feature] = field(default_factory=lambda: {"pixels": thumbnails})
    of_texts: Mapping[str, Feature] = field(default_factory=dict)

    @classmethod
    def build(cls, names: Sequence[str]) -> Diversity:
        """Build it from names and import paths: `my_features:clip` is a function, called `clip` in metrics.

        The function maps images or texts to features. ConfigError if a name or path does not exist.
        """
        imported = {name.rpartition(":")[2].rpartition(".")[2]: _import_feature(name) for name in names if ":" in name}
        if unknown := [name for name in names if name not in FEATURES and ":" not in name]:
            raise ConfigError(f"eval.diversity: there is no feature {unknown[0]!r}; {EXPECTED}")
        named = [{name: known[name] for name in names if name in known} for known in (IMAGE_FEATURES, TEXT_FEATURES)]
        return cls(named[0] | imported, named[1] | imported)

    @torch.no_grad()
    def describe(self, rollout: Rollout) -> dict[str, Tensor]:
        """Return the features [B, D] by metric name, diversity/NAME, on the device of the groups. Videos have each frame's."""
        features = self.of_images if rollout.texts is None else self.of_texts
        parts: dict[str, list[Tensor]] = {name: [] for name in features}
        for _, samples in rollout.batches() if features else ():
            for name, feature in features.items():
                parts[name].append(_describe_frames(feature, samples).float().to(rollout.groups.device))
        return {f"diversity/{name}": torch.cat(found) for name, found in parts.items()}

    def __call__(self, rollout: Rollout) -> dict[str, Tensor]:
        """Return d_g of every group of two or more samples, by metric name, diversity/NAME."""
        return {name: mean_distances(features, rollout.groups) for name, features in self.describe(rollout).items()}


def _describe_frames(feature: Feature, samples: Tensor | Sequence[str]) -> Tensor:
    """Return the features [B, D] of samples; of videos [B, F, 3, H, W] those of all frames, [B, F D]."""
    if not isinstance(samples, Tensor) or samples.ndim != 5:
        return feature(samples)
    return feature(samples.flatten(0, 1)).reshape(len(samples), -1)


def _import_feature(name: str) -> Feature:
    try:
        feature: Feature = import_object(name)
    except ImportError as error:
        raise ConfigError(f"eval.diversity: cannot import {name!r}: {error}; {EXPECTED}") from error
    first = FirstCall()
    return lambda samples: first(partial(feature, samples))
