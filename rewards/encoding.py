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
from rewards.pictures import to_pictures

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
    return [_encode(picture, format) for picture in to_pictures(images)]


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


def _encode(picture: Image.Image, format: str) -> bytes:
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
