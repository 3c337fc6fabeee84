"""Size of the picture as a JPEG: the first two rewards of DDPO (2305.13301, section 5.2).

Compressibility is −(kilobytes at quality 95), incompressibility +(kilobytes). A kilobyte is 1,000 bytes, as in the
published code. The number depends on the size of the image, so only pictures of one size can be compared. It depends a
little on the JPEG library too (here Pillow's).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from rewards.base import Metadata, Scores, WithoutDevice, all_valid, check_images
from rewards.pictures import LARGEST_SIDE, to_pictures


@dataclass
class JpegSize(WithoutDevice):
    """``sign`` × kilobytes of the image as a JPEG of this quality."""

    name: str
    sign: int
    quality: int = 95
    needs: tuple[str, ...] = ("images",)

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"reward '{self.name}': quality is {self.quality}, expected 1 to 100")

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W] in [0,1]. Those with a side that JPEG does not have are invalid."""
        images = check_images(samples, self.name)
        if max(images.shape[-2:]) > LARGEST_SIDE:
            nothing = torch.zeros(len(images), device=samples.device)
            return Scores(nothing, nothing.bool())
        pictures = to_pictures(images)
        kilobytes = [_jpeg_bytes(picture, self.quality) / 1000 for picture in pictures]
        return all_valid(self.sign * torch.tensor(kilobytes, device=samples.device))


def _jpeg_bytes(picture: Image.Image, quality: int) -> int:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    return buffer.tell()


def jpeg_compressibility(*, quality: int = JpegSize.quality) -> JpegSize:
    """Negative size of the picture as a JPEG, in kilobytes: rewards plain pictures."""
    return JpegSize("jpeg_compressibility", -1, quality)


def jpeg_incompressibility(*, quality: int = JpegSize.quality) -> JpegSize:
    """Size of the picture as a JPEG, in kilobytes: rewards busy pictures."""
    return JpegSize("jpeg_incompressibility", 1, quality)
