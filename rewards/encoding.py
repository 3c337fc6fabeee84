"""Images as PNG or JPEG files for the network, and back. No other format is ever read from network data."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards import image_files
from rewards.pictures import LARGEST_SIDE, to_pictures

T = TypeVar("T")
ImageFormat = Literal["png", "jpeg"]
"""png: lossless at 8 bits. jpeg: quality 95 without colour subsampling, a few times smaller, but lossy."""
FORMATS: tuple[str, ...] = get_args(ImageFormat)
_READABLE = ("PNG", "JPEG")


class BadImage(ValueError):
    """An image that cannot be read; `index` is its number in the request."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"image {index}: {problem}")
        self.index = index


def encode_images(images: Tensor, format: str) -> list[bytes]:
    """Return a file for each of the images [B,3,H,W] in [0,1], rounded to 8 bits."""
    if format == "jpeg" and images.shape[2] > LARGEST_SIDE:
        raise ValueError(f"a JPEG has at most {LARGEST_SIDE} pixels a side, found {images.shape[2]}; set format: png")
    return [encode_picture(picture, format) for picture in to_pictures(images)]


def to_strips(videos: Tensor) -> Tensor:
    """Return videos [B,F,3,H,W] as pictures [B,3,F·H,W], one frame below the other."""
    return videos.transpose(1, 2).flatten(2, 3)


def from_strips(strips: Tensor, frames: int) -> Tensor:
    """Return the videos [B,F,3,H,W] of pictures [B,3,F·H,W]. Raise BadImage if the height does not divide into frames."""
    count, channels, height, width = strips.shape
    if height % frames:
        raise BadImage(0, f"{height} pixels high, which does not divide into {frames} frames, one below the other")
    return strips.view(count, channels, frames, height // frames, width).transpose(1, 2)


def count_pixels(files: Sequence[bytes]) -> int:
    """Return the number of pixels in the headers of files. Raise TooManyPixels or BadImage for a bad file."""
    return sum(_read(image_files.count_pixels, index, file) for index, file in enumerate(files))


def decode_images(files: Sequence[bytes]) -> Tensor:
    """Return the 8-bit images [B,3,H,W] of files, which must have one size. Raise BadImage for a bad file."""
    arrays = list[np.ndarray]()
    for index, file in enumerate(files):  # one at a time: a picture of Pillow takes more memory than its array
        arrays.append(np.array(_read(image_files.read_picture, index, file)))
        if arrays[index].shape != arrays[0].shape:
            found, first = (f"{array.shape[1]}×{array.shape[0]}" for array in (arrays[index], arrays[0]))
            raise BadImage(index, f"{found} pixels, but the first image has {first}; send images of one size")
    # Copied by numpy, whose shortage of memory is a MemoryError.
    return torch.from_numpy(np.ascontiguousarray(np.stack(arrays).transpose(0, 3, 1, 2)))


def encode_picture(picture: Image.Image, format: str) -> bytes:
    """Return an RGB picture as a file."""
    buffer = io.BytesIO()
    if format == "jpeg":
        picture.save(buffer, format="JPEG", quality=95, subsampling=0)
    else:
        picture.save(buffer, format="PNG", compress_type=zlib.Z_RLE)  # a third of the default's time
    return buffer.getvalue()


def _read(read: Callable[[bytes, tuple[str, ...]], T], index: int, file: bytes) -> T:
    try:
        return read(file, _READABLE)
    except image_files.TooManyPixels:
        raise
    except image_files.ImageFileError as error:
        raise BadImage(index, str(error)) from error
