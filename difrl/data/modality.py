"""Modalities of recorded samples: images in separate files, or texts in the rows.

Code that reads or writes samples uses the modality of the run, and needs no other distinction of images and texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difrl.data.jsonl import DataFileError, JsonObject, describe_keys, describe_value, quote
from difrl.data.rollout import Content
from difrl.runtime.progress import count_done, phase
from rewards.image_files import ImageFileError, read_image_file

Item = Path | str
"""The value of a sample in a row: the path of an image, or the text itself."""


@dataclass(frozen=True)
class Modality:
    """Functions that read samples of one modality from files, and write them to files."""

    key: str
    """The key of the sample in a row of data.rows: samples."""
    item_reader: Callable[[Path], Callable[[JsonObject, str], Item]]
    """Folder of the file → (row, key) → the item, which is removed from the row. ValueError if there is none."""
    read: Callable[[Sequence[Item]], Content]
    """Items → samples."""
    write: Callable[[Any, Path, str], str]
    """(one sample, folder, name) → its value in a row of a file in the folder. An image is saved under the name."""
    find_problems: Callable[[Sequence[tuple[str, Item]]], list[str]]
    """Places (file:line) with their items → a line for each item that cannot be read. Images are decoded."""
    is_empty: Callable[[Any], bool]
    """True if a sample has no content, so that no row can be written for it."""


def read_images(paths: Sequence[Item]) -> Tensor:
    """Return the images of files, [B, 3, H, W] in [0, 1]. DataFileError if one is refused."""
    pictures = [np.asarray(_read_image(Path(path)), dtype=np.float32) / 255 for path in paths]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _read_image(path: Path) -> Image.Image:
    try:
        return read_image_file(path)
    except ImageFileError as error:
        raise DataFileError(f"{path}: {error}") from error


def _read_path(folder: Path) -> Callable[[JsonObject, str], Path]:
    """Return a reader of the image paths of rows, which start at a folder."""

    def read(row: JsonObject, key: str) -> Path:
        name = row.pop(key, None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{quote(key)} must be the path of an image, found {describe_value(name)}")
        if not (folder / name).exists():
            raise ValueError(f"{quote(key)}: there is no image {folder / name}")
        return folder / name

    return read


def _find_image_problems(items: Sequence[tuple[str, Item]]) -> list[str]:
    """Decode images, each after its place, and return a line for each that is refused or has not the size of the first."""
    sizes = []
    # Pillow decodes outside of the interpreter's lock.
    with ThreadPoolExecutor() as pool, phase("checking images", total=len(items)):
        for size in pool.map(lambda item: _size_or_problem(Path(item[1])), items):
            sizes.append(size)
            count_done()
    known = [(Path(item).name, size) for (_, item), size in zip(items, sizes, strict=True) if isinstance(size, tuple)]
    problems = list[str]()
    for (place, item), size in zip(items, sizes, strict=True):
        if isinstance(size, str):
            problems.append(f"{place}: {item}: {size}")
        elif size != known[0][1]:
            found, first = (f"{width} × {height}" for width, height in (size, known[0][1]))
            problems.append(
                f"{place}: {Path(item).name} has {found} pixels, and {known[0][0]} {first}; bring all images to one size"
            )
    return problems


def _size_or_problem(path: Path) -> tuple[int, int] | str:
    try:
        status = path.stat()
        return _decoded_size(path, status.st_size, status.st_mtime_ns)
    except (OSError, ImageFileError) as error:
        return str(error)


@cache  # `check`, the prompts and the trainer each load a run's files
def _decoded_size(path: Path, bytes: int, changed: int) -> tuple[int, int]:
    return read_image_file(path).size


def _save_image(image: Tensor, folder: Path, name: str) -> str:
    path = Path("images") / f"{name}.png"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    pixels = (image.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(folder / path)
    return path.as_posix()


def _read_text(row: JsonObject, key: str) -> str:
    if key not in row:
        raise ValueError(f"{quote(key)} is missing, found {describe_keys(row)}")
    text = row.pop(key)
    if not isinstance(text, str):
        raise ValueError(f"{quote(key)} must be the text of a completion, found {describe_value(text)}")
    if not text:
        raise ValueError(f"{quote(key)} is empty, expected a completion of at least one token; remove the row")
    return text


IMAGES = Modality(
    key="image",
    item_reader=_read_path,
    read=read_images,
    write=_save_image,
    find_problems=_find_image_problems,
    is_empty=lambda image: False,
)
TEXTS = Modality(
    key="text",
    item_reader=lambda folder: _read_text,
    read=lambda items: tuple(map(str, items)),
    write=lambda text, folder, name: str(text),
    find_problems=lambda items: [],
    is_empty=lambda text: not text,
)
MODALITIES: Mapping[str, Modality] = {"forward": IMAGES, "reverse": IMAGES, "tokens": TEXTS}
"""The modality of each likelihood.kind."""
