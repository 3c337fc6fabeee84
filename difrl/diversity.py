"""How much the samples of one prompt differ from each other: falling diversity is the first sign of collapse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from difrl.core import compact

THUMBNAIL = 16


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
