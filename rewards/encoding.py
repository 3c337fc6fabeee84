"""Images as PNG or JPEG files, which is how they travel, and back. Nothing else is ever read from what came over a network."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.pictures import to_pictures

Format = Literal["png", "jpeg"]
"""png: what 8 bits hold, exactly. jpeg: at quality 95 with full colour, a few times smaller, and not the same picture."""
FORMATS: tuple[str, ...] = get_args(Format)
_READ = ("PNG", "JPEG")
_EXACT = ("RGB", "L")  # modes that become RGB without a choice


class BadImage(ValueError):
    """An image that cannot be taken, by its index."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"image {index}: {problem}")
        self.index = index


class TooManyPixels(ValueError):
    """Images that would be too large when decoded."""


def encoded(images: Tensor, format: str) -> list[bytes]:
    """A file of each of the images [B,3,H,W] in [0,1], rounded to 8 bits."""
    return [_file(picture, format) for picture in to_pictures(images)]


def decoded(files: Sequence[bytes], most: int) -> Tensor:
    """Images [B,3,H,W] of 8 bits from files of one size; `most` limits their pixels together, before any is decoded."""
    opened = [_opened(index, file, most) for index, file in enumerate(files)]
    total = sum(image.width * image.height for image in opened)
    if total > most:
        raise TooManyPixels(f"{total} pixels in {len(files)} images, expected at most {most} in a request")
    for index, image in enumerate(opened):
        if image.size != opened[0].size:
            found, first = (f"{one.width}×{one.height}" for one in (image, opened[0]))
            raise BadImage(index, f"{found} pixels, but the first image has {first}; send images of one size")
    arrays = [_pixels(index, image) for index, image in enumerate(opened)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def checked_format(format: str, name: str) -> str:
    """The format, if it is one, else a ValueError that names the reward."""
    if format not in FORMATS:
        raise ValueError(f"reward '{name}': format is {format!r}, expected {' or '.join(FORMATS)}")
    return format


def _file(picture: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    if format == "jpeg":
        picture.save(buffer, format="JPEG", quality=95, subsampling=0)
    else:
        picture.save(buffer, format="PNG", compress_type=zlib.Z_RLE)  # a third of the default's time
    return buffer.getvalue()


def _opened(index: int, file: bytes, most: int) -> Image.Image:
    """An image of which only the header has been read."""
    try:
        image = Image.open(io.BytesIO(file), formats=_READ)
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"image {index}: {error}; expected at most {most} in a request") from error
    except Exception as error:  # anybody's bytes
        raise BadImage(index, "neither a PNG nor a JPEG file") from error
    if image.mode not in _EXACT:
        raise BadImage(index, f"colours of mode {image.mode}, expected {' or '.join(_EXACT)}; convert it to RGB")
    return image


def _pixels(index: int, image: Image.Image) -> np.ndarray:
    try:
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # anybody's bytes
        raise BadImage(index, f"a damaged {image.format} file: {error}") from error
