"""The pictures of a run folder as data URIs, so that a report is one file."""

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

from difrl.reporting.number_format import mean

MOST_FRAMES = 24  # a long run is thinned to this many: first and last stay, the rest at even distances
LARGEST = 500_000  # bytes: a larger picture is stored again as JPEG
WIDEST = 2000  # pixels, of a picture stored again
STEP = re.compile(r"step-(\d+)\.png$")


@dataclass(frozen=True)
class Picture:
    """A data URI and the size in pixels, which reserves its place before it is decoded."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Frame:
    """The fixed-prompt sample grid of one step; score is the mean over the samples that have one."""

    step: int
    picture: Picture
    prompts: tuple[str, ...] = ()
    score: float = math.nan


def read_frames(folder: Path, problems: list[str]) -> list[Frame]:
    found = sorted((int(match[1]), path) for path in folder.glob("step-*.png") if (match := STEP.search(path.name)))
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
    """The file's own bytes where they are few enough; decoded in any case, to know that it is whole."""
    try:
        data = path.read_bytes()
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        problems.append(f"The picture {path.name} is missing or damaged; it is left out.")
        return None
    kind = (image.format or "png").lower()
    if len(data) > LARGEST:
        image, kind = image.convert("RGB"), "jpeg"
        if image.width > WIDEST:
            image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88)
        data = buffer.getvalue()
    text = base64.b64encode(data).decode("ascii")
    return Picture(f"data:image/{kind};base64,{text}", image.width, image.height)


def _notes(path: Path, problems: list[str]) -> tuple[tuple[str, ...], float]:
    """Prompts and mean score from the JSON beside a grid; a grid without one is shown without them."""
    if not path.is_file():
        return (), math.nan
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        prompts = tuple(str(prompt) for prompt in value.get("prompts") or [])
        numbers = [one for row in value.get("scores") or [] for one in row if isinstance(one, int | float)]
    except (ValueError, TypeError, AttributeError):
        problems.append(f"{path.name} is not what was expected beside a sample grid; its scores are not shown.")
        return (), math.nan
    return prompts, mean(numbers)
