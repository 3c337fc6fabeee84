"""From images to the latents that a diffusion policy evaluates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difrl.policies.base import batches
from difrl.policies.diffusion.families import Family
from difrl.policies.errors import ModelError


def encoded(family: Family, images: Tensor, shape: Sequence[int], batch: int) -> Tensor:
    """Latents [B, *shape] of images [B, 3, H, W] in [0, 1], `batch` at a time."""
    parts = [family.encode_images(images[rows]) for rows in batches(len(images), batch)]
    if tuple(parts[0].shape[1:]) != tuple(shape):
        height, width = images.shape[-2:]
        factor = height // parts[0].shape[-2]
        raise ModelError(
            f"the images of data.train have {width} × {height} pixels, and the model is sampled at "
            f"{shape[-1] * factor} × {shape[-2] * factor}; resize the images, or set rollout.width: {width} and "
            f"rollout.height: {height}"
        )
    return torch.cat(parts)
