"""Modalities of recorded samples: images in separate files, or texts in the rows.

Code that reads or writes samples uses the modality of the run, and needs no other distinction of images and texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difrl.data.image_files import measure_images, read_image, take_path
from difrl.data.jsonl import JsonObject, describe_keys, describe_value, quote
from difrl.data.rollout import Content

Item = Path | str
"""The value of a sample in a row: the path of an image, or the text itself."""


@dataclass(frozen=True)
class Modality:
    """Functions that read samples of one modality from files, and write them to files."""

    key: str
    """The key of the sample in a row of data.rows: samples."""
    takes_images: bool
    """True if prompts may have an input image. For others, `image` in a row of prompts is metadata like any other key."""
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
    pictures = [np.asarray(read_image(Path(path)), dtype=np.float32) / 255 for path in paths]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _read_path(folder: Path) -> Callable[[JsonObject, str], Path]:
    """Return a reader of the image paths of rows, which start at a folder."""
    return lambda row, key: take_path(row, key, folder)


def _find_image_problems(items: Sequence[tuple[str, Item]]) -> list[str]:
    """Decode images, each after its place, and return a line for each that is refused or has not the size of the first."""
    sizes = measure_images([Path(item) for _, item in items])
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
    takes_images=True,
    item_reader=_read_path,
    read=read_images,
    write=_save_image,
    find_problems=_find_image_problems,
    is_empty=lambda image: False,
)
TEXTS = Modality(
    key="text",
    takes_images=False,
    item_reader=lambda folder: _read_text,
    read=lambda items: tuple(map(str, items)),
    write=lambda text, folder, name: str(text),
    find_problems=lambda items: [],
    is_empty=lambda text: not text,
)
MODALITIES: Mapping[str, Modality] = {"forward": IMAGES, "reverse": IMAGES, "tokens": TEXTS}
"""The modality of each likelihood.kind."""
