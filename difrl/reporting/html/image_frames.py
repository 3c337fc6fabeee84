"""Pictures of a run folder as data URIs, so that a report is one file."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from difrl.reporting.number_format import mean_of_finite
from rewards.image_files import ImageFileError, read_image_file

MOST_FRAMES = 24  # a long run is thinned to this many, evenly spaced from the first to the last
LARGEST = 500_000  # bytes: a larger picture is converted to JPEG
WIDEST = 2000  # pixels, of a converted picture
STEP_IMAGE = re.compile(r"step-(\d+)\.png$")


@dataclass(frozen=True)
class Picture:
    """A data URI, and the size in pixels, with which a browser reserves space before decoding."""

    uri: str
    width: int
    height: int
    playing: Picture | None = None
    """The same picture with videos that play."""


@dataclass(frozen=True)
class Frame:
    """The sample grid of one step. The score is the mean over the samples that have one."""

    step: int
    picture: Picture
    prompts: tuple[str, ...] = ()
    score: float = math.nan


def read_frames(folder: Path, problems: list[str]) -> list[Frame]:
    """Return the sample grids of a run in step order, at most MOST_FRAMES. Problems are appended to `problems`."""
    found = sorted(
        (int(match[1]), path) for path in folder.glob("step-*.png") if (match := STEP_IMAGE.search(path.name))
    )
    if len(found) > MOST_FRAMES:
        found = [found[round(index * (len(found) - 1) / (MOST_FRAMES - 1))] for index in range(MOST_FRAMES)]
    frames = []
    for step, path in found:
        picture = read_picture(path, problems)
        if picture is not None:
            prompts, score = _notes(path.with_suffix(".json"), problems)
            frames.append(Frame(step, picture, prompts, score))
    return frames


def read_picture(path: Path, problems: list[str]) -> Picture | None:
    """Return a picture, converted to JPEG if it is large, or None and a problem if it is damaged.

    If the sheet is of videos, the playing one is beside it. It is left out if it is large.
    """
    try:
        image, data, kind = read_image_file(path), path.read_bytes(), "png"
    except (OSError, ImageFileError):
        problems.append(f"The picture {path.name} is missing or damaged; it is left out.")
        return None
    if len(data) > LARGEST:
        kind = "jpeg"
        if image.width > WIDEST:
            image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88)
        data = buffer.getvalue()
    return Picture(_uri(kind, data), image.width, image.height, _read_playing(path.with_suffix(".webp")))


def _read_playing(path: Path) -> Picture | None:
    """Return an animated sheet, None if there is none that can be played."""
    try:
        if not 0 < path.stat().st_size <= LARGEST:
            return None
        with Image.open(path, formats=("WEBP",)) as image:
            return Picture(_uri("webp", path.read_bytes()), image.width, image.height)
    except (OSError, ValueError):
        return None


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _notes(path: Path, problems: list[str]) -> tuple[tuple[str, ...], float]:
    """Return the prompts and the mean score in the JSON file beside a grid, empty and NaN without that file."""
    if not path.is_file():
        return (), math.nan
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        prompts = tuple(str(prompt) for prompt in value.get("prompts") or [])
        numbers = [one for row in value.get("scores") or [] for one in row if isinstance(one, int | float)]
    except (ValueError, TypeError, AttributeError):
        problems.append(f"{path.name} is not a valid description of a sample grid; its scores are not shown.")
        return (), math.nan
    return prompts, mean_of_finite(numbers)
