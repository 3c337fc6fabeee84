"""Images as PNG or JPEG files for the network, and back. No other format is ever read from network data."""

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

ImageFormat = Literal["png", "jpeg"]
"""png: lossless at 8 bits. jpeg: quality 95 without colour subsampling, a few times smaller, but lossy."""
FORMATS: tuple[str, ...] = get_args(ImageFormat)
_READABLE = ("PNG", "JPEG")
_MODES = ("RGB", "L")  # modes with exactly one conversion to RGB


class BadImage(ValueError):
    """An image that cannot be read; `index` is its number in the request."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"image {index}: {problem}")
        self.index = index


class TooManyPixels(ValueError):
    """Images that would be too large once decoded."""


def encode_images(images: Tensor, format: str) -> list[bytes]:
    """Return a file for each of the images [B,3,H,W] in [0,1], rounded to 8 bits."""
    return [_encode(picture, format) for picture in to_pictures(images)]


def decode_images(files: Sequence[bytes], max_pixels: int) -> Tensor:
    """Return the 8-bit images [B,3,H,W] of files, which must have one size.

    Raise TooManyPixels, before any is decoded, if they have more than `max_pixels` together; BadImage for a bad file.
    """
    opened = [_open(index, file, max_pixels) for index, file in enumerate(files)]
    total = sum(image.width * image.height for image in opened)
    if total > max_pixels:
        raise TooManyPixels(f"{total} pixels in {len(files)} images, expected at most {max_pixels} in a request")
    for index, image in enumerate(opened):
        if image.size != opened[0].size:
            found, first = (f"{one.width}×{one.height}" for one in (image, opened[0]))
            raise BadImage(index, f"{found} pixels, but the first image has {first}; send images of one size")
    arrays = [_pixels(index, image) for index, image in enumerate(opened)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _encode(picture: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    if format == "jpeg":
        picture.save(buffer, format="JPEG", quality=95, subsampling=0)
    else:
        picture.save(buffer, format="PNG", compress_type=zlib.Z_RLE)  # a third of the default's time
    return buffer.getvalue()


def _open(index: int, file: bytes, max_pixels: int) -> Image.Image:
    """Return an image of which only the header has been read."""
    try:
        image = Image.open(io.BytesIO(file), formats=_READABLE)
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"image {index}: {error}; expected at most {max_pixels} in a request") from error
    except Exception as error:  # untrusted bytes can raise anything
        raise BadImage(index, "neither a PNG nor a JPEG file") from error
    if image.mode not in _MODES:
        raise BadImage(index, f"colours of mode {image.mode}, expected {' or '.join(_MODES)}; convert it to RGB")
    return image


def _pixels(index: int, image: Image.Image) -> np.ndarray:
    try:
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # untrusted bytes can raise anything
        raise BadImage(index, f"a damaged {image.format} file: {error}") from error
