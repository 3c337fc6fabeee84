"""Sharpness of a picture: 1 − the blur effect of Crété et al. (SPIE 6492, 2007, doi:10.1117/12.702790).

A blur takes much of the contrast between neighbouring pixels from a sharp picture, and little from a blurred one. With F
the luminance, B its mean over `width` pixels along an axis, and D the absolute difference of neighbours along that axis,
sharpness is Σ max(0, D_F − D_B) / Σ D_F, at the axis where it is lower. It does not depend on the contrast of the
picture, and little on its content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.base import Metadata, Scores, WithoutDevice, check_images

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601)."""


@dataclass
class Sharpness(WithoutDevice):
    """Share of the contrast between neighbouring pixels that a blur would take away: low for blurred pictures."""

    width: int = 9
    name: ClassVar[str] = "sharpness"
    needs: ClassVar[tuple[str, ...]] = ("images",)

    def __post_init__(self) -> None:
        if self.width < 3 or self.width % 2 == 0:
            raise ValueError(
                f"reward '{self.name}': width is {self.width}, expected an odd number of at least 3 pixels"
            )

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W] in [0,1]. Those of one colour have no contrast and are invalid."""
        grey = torch.einsum("bchw,c->bhw", check_images(samples, self.name), samples.new_tensor(LUMINANCE).float())
        axes = [_sums(grey, self.width), _sums(grey.mT, self.width)]
        lost, all_ = (torch.stack(sums) for sums in zip(*axes, strict=True))
        shares = torch.where(all_ > 0, lost / all_, torch.inf).amin(0)
        valid = shares.isfinite()
        return Scores(torch.where(valid, shares, 0.0), valid)


def _sums(grey: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the sums [B] of the contrast along the last axis that a blur takes away, and of all contrast."""
    blurred = F.avg_pool1d(F.pad(grey, (width // 2, width // 2), mode="replicate"), width, stride=1)
    contrast = grey.diff(dim=-1).abs()
    contrast = contrast * (contrast > 1e-6)  # smaller differences are rounding
    lost = (contrast - blurred.diff(dim=-1).abs()).clamp(min=0)
    return lost.sum((1, 2)), contrast.sum((1, 2))
