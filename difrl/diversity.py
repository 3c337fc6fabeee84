"""How much the samples of one prompt differ from each other: falling diversity is the first sign of collapse.

    d_g = mean over pairs i < j of group g of ‖f(x_i) − f(x_j)‖ / √D          f: images → features of D dimensions

A group of one has none. The metric is the mean of d_g over prompts, its standard error that over prompts. The unit is the
feature's: for `pixels`, the root-mean-square difference of a colour value in [0, 1] between thumbnails. Pixels notice that
samples are drawn in the same place and colours; a learned feature (`judge`, or CLIP's by import path) that they show the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from difrl.core import compact
from difrl.located import ConfigError
from difrl.paths import PACKAGE
from rewards.judge import JudgeNetwork

THUMBNAIL = 16

Feature = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [0, 1] -> [B, D], sample by sample, on any device."""


def thumbnails(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] averaged down to [B, 3 · 16 · 16]: what pixel diversity compares."""
    return F.adaptive_avg_pool2d(images.float(), THUMBNAIL).flatten(1)


def within(features: Tensor, groups: Tensor) -> Tensor:
    """Mean root-mean-square distance of two samples of one group, for every group of two or more.

    features [B, D], groups [B] -> [groups], in the order of their ids.
    """
    # By way of matrix products torch would find samples that are equal some 1e-3 apart.
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") / features.shape[1] ** 0.5
    index, number = compact(groups)
    first, second = torch.triu_indices(len(groups), len(groups), 1, device=groups.device)
    same = index[first] == index[second]
    first, second = first[same], second[same]
    total = distance.new_zeros(number).index_add(0, index[first], distance[first, second])
    pairs = index[first].bincount(minlength=number)
    return (total / pairs)[pairs > 0]


@functools.cache
def _judge() -> JudgeNetwork:
    return JudgeNetwork.load(PACKAGE / "assets" / "judge")


def judge(images: Tensor) -> Tensor:
    """What the shipped judge of the shapes world sees in images, [B, 144]."""
    return _judge().to(images.device).features(images.float())


FEATURES: Mapping[str, Feature] = {"pixels": thumbnails, "judge": judge}


@dataclass(frozen=True)
class Diversity:
    """Diversity within groups, by every feature of a recipe."""

    features: Mapping[str, Feature] = field(default_factory=lambda: {"pixels": thumbnails})

    @classmethod
    def build(cls, names: Sequence[str]) -> Diversity:
        """By name, or by import path: `my_features:clip` is a function from images to features, called `clip` in metrics."""
        return cls({name.rpartition(":")[2].rpartition(".")[2]: _feature(name) for name in names})

    @torch.no_grad()
    def describe(self, images: Tensor | None) -> dict[str, Tensor]:
        """diversity/NAME -> features [B, D]; empty where samples are not images."""
        if images is None:
            return {}
        return {f"diversity/{name}": feature(images).float() for name, feature in self.features.items()}

    def __call__(self, images: Tensor | None, groups: Tensor) -> dict[str, Tensor]:
        """diversity/NAME -> d_g of every group of two or more."""
        return {name: within(features, groups) for name, features in self.describe(images).items()}


def _feature(name: str) -> Feature:
    if name in FEATURES:
        return FEATURES[name]
    module, colon, attribute = name.partition(":")
    known = f"expected {', '.join(FEATURES)}, or module:function"
    if not colon:
        raise ConfigError(f"eval.diversity: there is no feature {name!r}; {known}")
    try:
        found: Feature = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"eval.diversity: cannot import {name!r}: {error}; {known}") from error
    return found
