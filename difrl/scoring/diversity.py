"""How much the samples of one prompt differ from each other: falling diversity is the first sign of collapse.

    d_g = mean over pairs i < j of group g of ‖f(x_i) − f(x_j)‖ / √D     f: images or texts → features of D dimensions

A group of one has none. The metric is the mean of d_g over prompts, its standard error that over prompts. The unit is the
feature's: for `pixels`, the root-mean-square difference of a colour value in [0, 1] between thumbnails; for `ngrams`, from 0
(texts alike) to 1 (no three letters in common). Pixels notice that samples are drawn in the same place and colours; a
learned feature (`judge`, or CLIP's by import path) that they show the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
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

THUMBNAIL = 16
BUCKETS = 1024
"""Dimensions of `ngrams`; 3-grams that fall into the same one count as equal."""

Feature = Callable[[Any], Tensor]
"""Images [B, 3, H, W] in [0, 1] or B texts -> [B, D], sample by sample; of images on their device."""


def thumbnails(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] averaged down to [B, 3 · 16 · 16]: what pixel diversity compares."""
    return F.adaptive_avg_pool2d(images.float(), THUMBNAIL).flatten(1)


def mean_distances(features: Tensor, groups: Tensor) -> Tensor:
    """Mean root-mean-square distance of two samples of one group, for every group of two or more.

    features [B, D], groups [B] -> [groups], in the order of their ids.
    """
    index, number = group_index(groups)
    members = [features[index == group] for group in range(number)]
    # pdist takes differences; by way of matrix products samples that are equal would be some 1e-3 apart.
    found = [torch.pdist(own).mean() for own in members if len(own) > 1]
    return (torch.stack(found) if found else features.new_zeros(0)) / features.shape[1] ** 0.5


@functools.cache
def _judge() -> JudgeNetwork:
    return JudgeNetwork.load(PACKAGE / "assets" / "judge")


def judge(images: Tensor) -> Tensor:
    """What the shipped judge of the shapes world sees in images, [B, 144]."""
    return _judge().to(images.device).features(images.float())


@functools.lru_cache(65536)
def _bucket(gram: str) -> int:
    return crc32(gram.encode(errors="surrogatepass")) % BUCKETS  # the same in every process; Python's hash is not


def ngrams(texts: Sequence[str]) -> Tensor:
    """Counts of the character 3-grams of B texts, hashed into [B, 1024] and scaled to a norm of √(1024 / 2).

    The distance of two texts is then √(1 − cos). Beginning and end count as characters, so that texts of fewer
    than three have 3-grams too.
    """
    counts = torch.zeros(len(texts), BUCKETS)
    for row, text in zip(counts, texts, strict=True):
        marked = f"\x02\x02{text}\x03"
        buckets = torch.tensor([_bucket(marked[i : i + 3]) for i in range(len(marked) - 2)])
        row += buckets.bincount(minlength=BUCKETS)
    return F.normalize(counts, dim=1) * (BUCKETS / 2) ** 0.5


OF_IMAGES: Mapping[str, Feature] = {"pixels": thumbnails, "judge": judge}
OF_TEXTS: Mapping[str, Feature] = {"ngrams": ngrams}
FEATURES = (*OF_IMAGES, *OF_TEXTS)


@dataclass(frozen=True)
class Diversity:
    """Diversity within groups, by every feature of a recipe that reads what the policy makes."""

    of_images: Mapping[str, Feature] = field(default_factory=lambda: {"pixels": thumbnails})
    of_texts: Mapping[str, Feature] = field(default_factory=dict)

    @classmethod
    def build(cls, names: Sequence[str]) -> Diversity:
        """By name, or by import path: `my_features:clip` is a function from images, or from texts, called `clip` in metrics."""
        imported = {name.rpartition(":")[2].rpartition(".")[2]: _imported(name) for name in names if ":" in name}
        if unknown := [name for name in names if name not in FEATURES and ":" not in name]:
            raise ConfigError(f"eval.diversity: there is no feature {unknown[0]!r}; {_known()}")
        named = [{name: known[name] for name in names if name in known} for known in (OF_IMAGES, OF_TEXTS)]
        return cls(named[0] | imported, named[1] | imported)

    @torch.no_grad()
    def describe(self, rollout: Rollout) -> dict[str, Tensor]:
        """diversity/NAME -> features [B, D], on the device of the groups."""
        of_images = {} if rollout.images is None else {n: f(rollout.images) for n, f in self.of_images.items()}
        of_texts = {} if rollout.texts is None else {n: f(rollout.texts) for n, f in self.of_texts.items()}
        found = of_images | of_texts
        return {f"diversity/{name}": value.float().to(rollout.groups.device) for name, value in found.items()}

    def __call__(self, rollout: Rollout) -> dict[str, Tensor]:
        """diversity/NAME -> d_g of every group of two or more."""
        return {name: mean_distances(features, rollout.groups) for name, features in self.describe(rollout).items()}


def _known() -> str:
    return f"expected {', '.join(FEATURES)}, or module:function"


def _imported(name: str) -> Feature:
    module, _, attribute = name.partition(":")
    try:
        found: Feature = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"eval.diversity: cannot import {name!r}: {error}; {_known()}") from error
    return found
