"""Modalities of recorded samples: images and videos in separate files, or texts in the rows.

Code that reads or writes samples uses the modality of the run, and needs no other distinction of images, videos and texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difrl.config import RunConfig
from difrl.data.image_files import Size, measure_images, measure_videos, read_image, read_video, take_path
from difrl.data.jsonl import JsonObject, describe_keys, describe_value, quote
from difrl.data.rollout import Content
from difrl.data.videos import Videos
from rewards.video_files import write_video_file

Item = Path | str
"""The value of a sample in a row: the path of an image or a video, or the text itself."""


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
    """(content of one sample, folder, name) → its value in a row of a file in the folder. A picture is saved under the name."""
    find_problems: Callable[[Sequence[tuple[str, Item]]], list[str]]
    """Places (file:line) with their items → a line for each item that cannot be read. Images and videos are decoded."""
    filled: Callable[[Any], list[bool]]
    """Samples → False for each that has no content, so that no row can be written for it."""


def read_images(paths: Sequence[Item]) -> Tensor:
    """Return the images of files, [B, 3, H, W] in [0, 1]. DataFileError if one is refused."""
    pictures = [np.asarray(read_image(Path(path)), dtype=np.float32) / 255 for path in paths]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def read_videos(paths: Sequence[Item]) -> Tensor:
    """Return the videos of files, [B, F, 3, H, W] in [0, 1]. DataFileError if one is refused."""
    return torch.stack([read_video(Path(path)) for path in paths])


def _read_path(noun: str, folder: Path) -> Callable[[JsonObject, str], Path]:
    """Return a reader of the paths of images or videos in rows, which start at a folder."""
    return lambda row, key: take_path(row, key, folder, noun)


def _find_problems(
    noun: str, measure: Callable[[Sequence[Path]], list[Size | str]], items: Sequence[tuple[str, Item]]
) -> list[str]:
    """Decode files, each after its place, and return a line for each that is refused or has not the size of the first."""
    sizes = measure([Path(item) for _, item in items])
    known = [(Path(item).name, size) for (_, item), size in zip(items, sizes, strict=True) if isinstance(size, tuple)]
    problems = list[str]()
    for (place, item), size in zip(items, sizes, strict=True):
        if isinstance(size, str):
            problems.append(f"{place}: {item}: {size}")
        elif size != known[0][1]:
            found, first = _describe_size(size), _describe_size(known[0][1])
            problems.append(
                f"{place}: {Path(item).name} has {found}, and {known[0][0]} {first}; bring all {noun}s to one size"
            )
    return problems


def _describe_size(size: Size) -> str:
    width, height, *frames = size
    return f"{width} × {height} pixels" + (f" and {frames[0]} frames" if frames else "")


def _save_image(images: Tensor, folder: Path, name: str) -> str:
    path = _new_path(folder, "images", f"{name}.png")
    pixels = (images[0].permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(folder / path)
    return path.as_posix()


def _save_video(videos: Videos, folder: Path, name: str) -> str:
    path = _new_path(folder, "videos", f"{name}.webp")
    ((_, frames),) = videos.batches()
    write_video_file(frames[0], folder / path)
    return path.as_posix()


def _new_path(folder: Path, kind: str, name: str) -> Path:
    (folder / kind).mkdir(parents=True, exist_ok=True)
    return Path(kind) / name


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
    item_reader=partial(_read_path, "an image"),
    read=read_images,
    write=_save_image,
    find_problems=partial(_find_problems, "image", measure_images),
    filled=lambda images: [True] * len(images),
)
VIDEOS = Modality(
    key="video",
    takes_images=True,
    item_reader=partial(_read_path, "a video"),
    read=lambda items: Videos(tuple(items), read_videos, batch=1),
    write=_save_video,
    find_problems=partial(_find_problems, "video", measure_videos),
    filled=lambda videos: [True] * len(videos),
)
TEXTS = Modality(
    key="text",
    takes_images=False,
    item_reader=lambda folder: _read_text,
    read=lambda items: tuple(map(str, items)),
    write=lambda texts, folder, name: str(texts[0]),
    find_problems=lambda items: [],
    filled=lambda texts: [bool(text) for text in texts],
)


def find_modality(config: RunConfig) -> Modality:
    """Return the modality of a recipe's samples."""
    if config.likelihood.kind == "tokens":
        return TEXTS
    return IMAGES if config.rollout.frames is None else VIDEOS
