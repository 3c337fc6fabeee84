"""Input images of rewards that judge an edit: the picture that a prompt changes, and the region that it may change.

They are files that the metadata name with absolute paths, under `image` and `mask`. difrl fills both in from the rows of a
run. A path means nothing on another machine: `remote` sends the files (`pack_inputs`), and the server fills in where it put
them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.base import Metadata, MetadataError
from rewards.encoding import encode_picture
from rewards.image_files import ImageFileError, read_image_file

IMAGE, MASK = "image", "mask"
"""Keys of the metadata."""


def read_inputs(name: str, prompts: Sequence[str], metadata: Metadata) -> list[Tensor]:
    """Return the input image [3,H,W] in [0,1] of each of B rows. Each file is read once. MetadataError if a row has none.

    name: that of the reward, for messages.
    """
    files = dict[str, Tensor]()
    inputs = list[Tensor]()
    for row, (prompt, facts) in enumerate(zip(prompts, metadata, strict=True)):
        image = _read(name, prompt, facts, row, IMAGE, files)
        if image is None:
            problem = (
                "the metadata have no input image; rows of prompts name it as `image`, and `difrl score` takes --image"
            )
            raise MetadataError(name, problem, row, prompt)
        inputs.append(image)
    return inputs


def read_masks(name: str, prompts: Sequence[str], metadata: Metadata) -> list[Tensor | None]:
    """Return the mask [1,H,W] in [0,1] of each of B rows, 1 where the image may change; None for rows without one."""
    files = dict[str, Tensor]()
    found = [_read(name, prompts[row], facts, row, MASK, files) for row, facts in enumerate(metadata)]
    return [None if mask is None else mask.mean(0, keepdim=True) for mask in found]


def pack_inputs(metadata: Metadata) -> tuple[list[dict[str, Any]], list[dict[str, int]], list[bytes]]:
    """Return what replaces the paths of B rows: the other metadata, the numbers of files by key, and the files as PNG.

    Each file occurs once. A path that is not absolute or has no image stays in the metadata.
    """
    rows, numbers, files = list[dict[str, Any]](), list[dict[str, int]](), dict[str, bytes]()
    for facts in metadata:
        numbers.append({})
        for key in (IMAGE, MASK):
            path = facts.get(key)
            if not isinstance(path, str) or not os.path.isabs(path):
                continue
            try:
                files[path] = files.get(path) or encode_picture(read_image_file(Path(path)), "png")
            except ImageFileError:
                continue
            numbers[-1][key] = list(files).index(path)
        rows.append({key: value for key, value in facts.items() if key not in numbers[-1]})
    return rows, numbers, list(files.values())


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Return an image [C,H,W] in [0,1] at another size, by antialiased bicubic interpolation, clamped to [0,1]."""
    if image.shape[-2:] == (height, width):
        return image
    resized = F.interpolate(image[None], (height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].clamp(0, 1)


def _read(
    name: str, prompt: str, facts: Mapping[str, Any], row: int, key: str, files: dict[str, Tensor]
) -> Tensor | None:
    path = facts.get(key)
    if path is None:
        return None
    if not isinstance(path, str) or not os.path.isabs(path):
        raise MetadataError(name, f"`{key}` in the metadata is {path!r}, expected an absolute path", row, prompt)
    if path not in files:
        try:
            pixels = np.array(read_image_file(Path(path)), dtype=np.float32)
        except ImageFileError as error:
            raise MetadataError(name, f"`{key}` in the metadata: {path}: {error}", row, prompt) from error
        files[path] = torch.from_numpy(pixels).permute(2, 0, 1).div(255)
    return files[path]
