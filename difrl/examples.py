"""Images that exist already, with what is thought of them: preference pairs, and samples with rewards.

* pairs: {"prompt": "...", "chosen": "images/1.png", "rejected": "images/2.png"} a line,
* samples: {"prompt": "...", "image": "images/1.png", "reward": 0.5} a line; rows of one prompt belong together, and
  demonstrations have reward 1.

Both may hold "metadata", "negative" and "weight", as a file of prompts does. A relative path starts at the file's folder.
All images of a file have one size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from difrl.config import DataConfig
from difrl.data import Prompt, PromptFileError, json_lines, load_prompts, named, prompt_of, quoted, read_text


@dataclass(frozen=True)
class Example:
    """The images of one prompt, which are compared with each other."""

    prompt: Prompt
    images: tuple[Path, ...]
    rewards: tuple[float, ...]


def load_examples(data: DataConfig) -> list[Example]:
    """The examples of data.train; PromptFileError with a line for each problem."""
    path = Path(data.train)
    if path.suffix.lower() != ".jsonl":
        raise PromptFileError(
            f"{path}: data.rows: {data.rows} are read from a .jsonl file, found {path.suffix or 'none'}"
        )
    form = _FORMS[data.rows]
    if not path.exists():
        raise PromptFileError(
            f"{data.train}: no such file, looked for {path.absolute()}; make one with `difrl pairs RECIPE --out FOLDER`, or "
            "write it"
        )
    examples = form.gather(json_lines(data.train, read_text(path, data.train), form.read(_Images(path.parent))))
    if not examples:
        raise PromptFileError(f"{path}: no row in it, expected at least one")
    for example in examples:
        if len(example.images) < data.group_size:
            raise PromptFileError(
                f"{path}: {example.prompt.text!r} has {len(example.images)} images, and data.group_size is "
                f"{data.group_size}; lower it, or add images of this prompt"
            )
    return examples


def training_prompts(data: DataConfig) -> list[Prompt]:
    """The prompts that a run is trained on, whatever the rows of its file hold."""
    return load_prompts(data.train) if data.rows == "prompts" else [e.prompt for e in load_examples(data)]


def read_images(paths: Sequence[Path]) -> Tensor:
    """[B, 3, H, W] in [0, 1]."""
    pictures = [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255 for path in paths]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


@dataclass
class _Images:
    """Finds the images that rows name, and holds them to the size of the first."""

    folder: Path
    first: tuple[str, tuple[int, int]] | None = field(default=None, init=False)

    def __call__(self, row: dict[str, Any], key: str) -> Path:
        name = row.pop(key, None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{quoted(key)} must be the path of an image, found {named(name)}")
        path = self.folder / name
        try:
            with Image.open(path) as image:
                size = image.size
        except FileNotFoundError as error:
            raise ValueError(f"{quoted(key)}: there is no image {path}") from error
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{quoted(key)}: {path} is no image that can be read") from error
        self.first = self.first or (name, size)
        if size != self.first[1]:
            raise ValueError(
                f"{quoted(key)}: {name} has {_pixels(size)} pixels, and {self.first[0]} {_pixels(self.first[1])}; bring all "
                "images to one size"
            )
        return path


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def _pairs(images: _Images) -> Callable[[dict[str, Any]], Example]:
    def read(row: dict[str, Any]) -> Example:
        paths = images(row, "chosen"), images(row, "rejected")
        return Example(prompt_of(row), paths, (1.0, 0.0))

    return read


def _samples(images: _Images) -> Callable[[dict[str, Any]], Example]:
    def read(row: dict[str, Any]) -> Example:
        path, reward = images(row, "image"), row.pop("reward", None)
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
            raise ValueError(f'"reward" must be a number, found {named(reward)}; demonstrations have 1')
        return Example(prompt_of(row), (path,), (float(reward),))

    return read


def _each(found: Sequence[Example]) -> list[Example]:
    return list(found)


def _by_prompt(found: Sequence[Example]) -> list[Example]:
    """Samples of one prompt as one example, in the order of the file; what the first row says of the prompt holds."""
    together: dict[str, list[Example]] = {}
    for example in found:
        together.setdefault(example.prompt.text, []).append(example)
    return [
        Example(
            rows[0].prompt,
            tuple(path for row in rows for path in row.images),
            tuple(reward for row in rows for reward in row.rewards),
        )
        for rows in together.values()
    ]


@dataclass(frozen=True)
class _Form:
    """How the rows of a form are read, and which of them make an example."""

    read: Callable[[_Images], Callable[[dict[str, Any]], Example]]
    gather: Callable[[Sequence[Example]], list[Example]]


_FORMS: Mapping[str, _Form] = {"pairs": _Form(_pairs, _each), "samples": _Form(_samples, _by_prompt)}
