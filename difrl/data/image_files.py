"""Files of images and videos that rows of prompts and recorded samples name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difrl.data.jsonl import DataFileError, JsonObject, describe_value, quote
from difrl.runtime.progress import count_done, phase
from rewards.image_files import ImageFileError, read_image_file
from rewards.video_files import read_video_file

Size = tuple[int, ...]
"""Width and height in pixels, and the number of frames of a video."""


def read_image(path: Path) -> Image.Image:
    """Return the RGB picture of a file. DataFileError if it is refused."""
    try:
        return read_image_file(path)
    except ImageFileError as error:
        raise DataFileError(f"{path}: {error}") from error


def read_video(path: Path) -> Tensor:
    """Return the video of a file, [F, 3, H, W] in [0, 1]. DataFileError if it is refused."""
    try:
        frames = [np.asarray(frame, dtype=np.float32) / 255 for frame in read_video_file(path)]
    except ImageFileError as error:
        raise DataFileError(f"{path}: {error}") from error
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def take_path(row: JsonObject, key: str, folder: Path, noun: str = "an image") -> Path:
    """Remove a file's path, which starts at a folder, from a row and return it. ValueError if there is no such file."""
    name = row.pop(key, None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{quote(key)} must be the path of {noun}, found {describe_value(name)}")
    if not os.path.exists(folder / name):  # Path.exists raises for a name that is too long
        raise ValueError(f"{quote(key)}: there is no {noun.split()[-1]} {folder / name}")
    return folder / name


def measure_images(paths: Sequence[Path]) -> list[Size | str]:
    """Decode images. Return the size of each, or the reason for which it is refused."""
    return _measure(paths, "images", lambda path: read_image_file(path).size)


def measure_videos(paths: Sequence[Path]) -> list[Size | str]:
    """Decode videos. Return the size of each with its number of frames, or the reason for which it is refused."""
    return _measure(paths, "videos", _measure_video)


def _measure_video(path: Path) -> Size:
    frames = read_video_file(path)
    return (*frames[0].size, len(frames))


def _measure(paths: Sequence[Path], noun: str, read_size: Callable[[Path], Size]) -> list[Size | str]:
    # Pillow decodes outside of the interpreter's lock.
    with ThreadPoolExecutor() as pool, phase(f"checking {noun}", total=len(paths)):
        sizes = []
        for size in pool.map(partial(_size_or_problem, noun, read_size), paths):
            sizes.append(size)
            count_done()
    return sizes


def _size_or_problem(noun: str, read_size: Callable[[Path], Size], path: Path) -> Size | str:
    try:
        status = path.stat()
        key = noun, path, status.st_size, status.st_mtime_ns
        if key not in _SIZES:  # `check`, the prompts and the trainer each load a run's files
            _SIZES[key] = read_size(path)
        return _SIZES[key]
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ImageFileError as error:
        return str(error)


_SIZES: dict[tuple[str, Path, int, int], Size] = {}
"""Sizes of files by medium, path, number of bytes and time of their last change."""
