"""Modalities of recorded samples: images in separate files, or texts in the rows.

Code that reads or writes samples uses the modality of the run, and needs no other distinction of images and texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from difrl.data.jsonl import JsonObject, describe_keys, describe_value, quote
from difrl.data.rollout import Content

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
    is_empty: Callable[[Any], bool]
    """True if a sample has no content, so that no row can be written for it."""


def read_images(paths: Sequence[Item]) -> Tensor:
    """Return the images of files, [B, 3, H, W] in [0, 1]."""
    pictures = [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255 for path in paths]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


@dataclass
class _ImageReader:
    """A reader of the image paths of rows. It checks that each image exists and has the size of the first."""

    folder: Path
    first: tuple[str, tuple[int, int]] | None = field(default=None, init=False)

    def __call__(self, row: JsonObject, key: str) -> Path:
        name = row.pop(key, None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{quote(key)} must be the path of an image, found {describe_value(name)}")
        path = self.folder / name
        try:
            with Image.open(path) as image:
                size = image.size
        except FileNotFoundError as error:
            raise ValueError(f"{quote(key)}: there is no image {path}") from error
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{quote(key)}: {path} is not an image that can be read") from error
        self.first = self.first or (name, size)
        if size != self.first[1]:
            raise ValueError(
                f"{quote(key)}: {name} has {_pixels(size)} pixels, and {self.first[0]} {_pixels(self.first[1])}; bring all "
                "images to one size"
            )
        return path


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


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
    item_reader=_ImageReader,
    read=read_images,
    write=_save_image,
    is_empty=lambda image: False,
)
TEXTS = Modality(
    key="text",
    item_reader=lambda folder: _read_text,
    read=lambda items: tuple(map(str, items)),
    write=lambda text, folder, name: str(text),
    is_empty=lambda text: not text,
)
MODALITIES: Mapping[str, Modality] = {"forward": IMAGES, "reverse": IMAGES, "tokens": TEXTS}
"""The modality of each likelihood.kind."""
