"""Image files that rows of prompts and recorded samples name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from PIL import Image

from difrl.data.jsonl import DataFileError, JsonObject, describe_value, quote
from difrl.runtime.progress import count_done, phase
from rewards.image_files import ImageFileError, read_image_file

Size = tuple[int, int]
"""Width and height in pixels."""


def read_image(path: Path) -> Image.Image:
    """Return the RGB picture of a file. DataFileError if it is refused."""
    try:
        return read_image_file(path)
    except ImageFileError as error:
        raise DataFileError(f"{path}: {error}") from error


def take_path(row: JsonObject, key: str, folder: Path) -> Path:
    """Remove an image's path, which starts at a folder, from a row and return it. ValueError if there is no such file."""
    name = row.pop(key, None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{quote(key)} must be the path of an image, found {describe_value(name)}")
    if not os.path.exists(folder / name):  # Path.exists raises for a name that is too long
        raise ValueError(f"{quote(key)}: there is no image {folder / name}")
    return folder / name


def measure_images(paths: Sequence[Path]) -> list[Size | str]:
    """Decode images. Return the size of each, or the reason for which it is refused."""
    # Pillow decodes outside of the interpreter's lock.
    with ThreadPoolExecutor() as pool, phase("checking images", total=len(paths)):
        sizes = []
        for size in pool.map(_size_or_problem, paths):
            sizes.append(size)
            count_done()
    return sizes


def _size_or_problem(path: Path) -> Size | str:
    try:
        status = path.stat()
        return _decoded_size(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ImageFileError as error:
        return str(error)


@cache  # `check`, the prompts and the trainer each load a run's files
def _decoded_size(path: Path, bytes: int, changed: int) -> Size:
    return read_image_file(path).size
