"""Prompts from text files, JSON lines and built-in tasks.

* `prompts.txt`: one prompt a line. Blank lines and comments are skipped. A comment begins with a `#` that is alone or
  followed by a space (`#nofilter` is a prompt).
* `prompts.jsonl`: an object a line, {"prompt": "...", "image": "cat.png", "metadata": {...}, "negative": "...",
  "weight": 2}. Only the prompt is required. `image` is the input image of editing and image-to-video: a path that starts at
  the file's folder. All rows of a file have one, or none has. Beside it, `mask` may name a picture that is white where
  the image may change. In a line without "metadata" all other keys are metadata, as in GenEval's published file, which
  has "tag" and "include" beside "prompt".
* `shapes:train`, `shapes:eval`, `shapes:all`, and the same for `arithmetic`: a built-in task and a part of its split.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difrl.data.image_files import measure_images, take_path
from difrl.data.jsonl import (
    LISTED,
    DataFileError,
    JsonObject,
    describe_keys,
    describe_value,
    join_problems,
    quote,
    read_json_lines,
    read_text,
)
from difrl.runtime.suggestions import did_you_mean
from difrl.tasks import arithmetic, moving_shapes, shapes


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, with metadata for rewards, a negative prompt, a weight that sets how often it is drawn, and an input image."""

    text: str
    metadata: Mapping[str, Any]
    negative: str | None = None
    weight: float = 1.0
    image: Path | None = None
    """Absolute path of the input image."""
    mask: Path | None = None
    """Absolute path of a picture that is white where the input image may change; None if all of it may. For rewards."""
    place: str = field(default="", compare=False)
    """Place for messages: file:line, or its number in a built-in set."""

    @property
    def files(self) -> dict[str, Path]:
        """The paths of the input image and of its mask, by key, of those that there are."""
        return {key: path for key, path in ((IMAGE, self.image), (MASK, self.mask)) if path is not None}


IMAGE, INPUT_IMAGE, MASK = "image", "input_image", "mask"
"""Keys of the input image in a row of prompts, and in a row of samples, whose `image` is the sample; of its mask."""
_TASKS: Mapping[str, Callable[[Any], Sequence[shapes.ShapesPrompt | arithmetic.Problem]]] = {
    "shapes": shapes.prompts,
    "moving_shapes": moving_shapes.prompts,
    "arithmetic": arithmetic.list_problems,
}
_BUILT_IN = {f"{task}:{split}": (task, split) for task in _TASKS for split in ("train", "eval", "all")}


def load_prompts(source: str, base: Path | None = None, *, images: bool = True) -> list[Prompt]:
    """Load the prompts of a .txt or .jsonl file, or of a built-in set. Relative paths start at `base`.

    images: whether prompts may have input images. Otherwise `image` in a row is metadata, like any key of the user's.
    Raise DataFileError with a line for each problem. Input images exist; `check_images` decodes them.
    """
    path = Path(base or "", source)
    match path.suffix.lower():
        case ".txt":
            prompts = _parse_text(source, read_text(path, source))
        case ".jsonl":
            key = IMAGE if images else None
            prompts = read_json_lines(path, source, lambda row, place: build_prompt(row, place, path.parent, key))
            check_all_or_none(source, prompts)
        case _:
            return _built_in_prompts(source)
    if not prompts:
        raise DataFileError(f"{source}: no prompt in it, expected at least one")
    return prompts


def _parse_text(source: str, text: str) -> list[Prompt]:
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    return [Prompt(line, {}, place=f"{source}:{n}") for n, line in lines if line and line.split()[0] != "#"]


def _built_in_prompts(name: str) -> list[Prompt]:
    if name not in _BUILT_IN:
        found = "there is no built-in set of that name" if ":" in name else "expected a .txt or .jsonl file"
        hint = did_you_mean(name, _BUILT_IN, "did you mean {}?") or f"Built-in sets: {', '.join(_BUILT_IN)}"
        raise DataFileError(f"{name}: {found}; {hint}")
    task, split = _BUILT_IN[name]
    rows = enumerate(_TASKS[task](split), 1)
    return [Prompt(row.text, row.metadata, place=f"{name}, number {number}") for number, row in rows]


def check_all_or_none(source: str, prompts: Sequence[Prompt]) -> None:
    """Raise DataFileError if some prompts of a file have an input image and others have none."""
    with_image = sum(prompt.image is not None for prompt in prompts)
    if with_image in (0, len(prompts)):
        return
    few = with_image <= len(prompts) / 2
    different = [prompt.place for prompt in prompts if (prompt.image is not None) == few]
    listed = ", ".join(different[:LISTED]) + (f" and {len(different) - LISTED} more" if len(different) > LISTED else "")
    raise DataFileError(
        f"{source}: {with_image} of {len(prompts)} rows have an input image, expected all or none; "
        f"{'only these have one' if few else 'these have none'}: {listed}"
    )


def check_images(prompts: Sequence[Prompt]) -> None:
    """Decode the input images of prompts. Raise DataFileError with a line for each that is refused."""
    places = dict[Path, str]()
    for prompt in prompts:
        for path in prompt.files.values():
            places.setdefault(path, prompt.place)
    found = zip(places.items(), measure_images(list(places)), strict=True)
    problems = [(place, str(path), size) for (path, place), size in found if isinstance(size, str)]
    if problems:
        raise DataFileError(join_problems([": ".join(filter(None, problem)) for problem in problems], "images"))


def build_prompt(row: JsonObject, place: str, folder: Path, image_key: str | None) -> Prompt:
    """Build the prompt of a row, with its input image, negative prompt, weight and metadata.

    folder: where paths start. image_key: the key of the input image, None if `image` is metadata. ValueError if the row has
    no valid prompt.
    """
    if "prompt" not in row:
        raise ValueError(f'"prompt" is missing, found {describe_keys(row)}')
    image = None if image_key is None else _take_image(row, folder, image_key)
    mask = None if image is None else _take_image(row, folder, MASK)
    text, negative, weight = row.get("prompt"), row.get("negative"), row.get("weight", 1)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"prompt" must be text that is not empty, found {describe_value(text)}')
    if negative is not None and not isinstance(negative, str):
        raise ValueError(f'"negative" must be text or null, found {describe_value(negative)}')
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f'"weight" must be a number above 0, found {describe_value(weight)}')
    if not 0 < weight <= sys.float_info.max:
        raise ValueError(f'"weight" must be a number above 0, found {weight}')
    prompt = Prompt(text, _metadata(row), negative, float(weight), image, mask, place)
    if taken := prompt.metadata.keys() & prompt.files.keys():
        raise ValueError(
            f'"metadata" has {quote(min(taken))}, where rewards find that of the row; rename or remove one'
        )
    return prompt


def _take_image(row: JsonObject, folder: Path, key: str) -> Path | None:
    if row.get(key) is None:
        row.pop(key, None)
        return None
    try:
        return take_path(row, key, folder).absolute()
    except ValueError as error:
        raise ValueError(
            f'{error}; it belongs to the input image, and anything else belongs inside "metadata"'
        ) from error


def _metadata(row: JsonObject) -> Mapping[str, Any]:
    if "negative_prompt" in row:
        raise ValueError('"negative_prompt" is not a key; write "negative"')
    if "metadata" not in row:
        # In GenEval's file the whole row is metadata, the prompt included. A prompt alone is not metadata.
        others = {key: value for key, value in row.items() if key not in ("negative", "weight")}
        return others if len(others) > 1 else {}
    if unknown := [key for key in row if key not in ("prompt", "metadata", "negative", "weight")]:
        raise ValueError(f'unknown key {quote(unknown[0])}; put it inside "metadata", or remove it')
    metadata = row["metadata"]
    if not isinstance(metadata, dict):
        raise ValueError(f'"metadata" must be an object, found {describe_value(metadata)}')
    return metadata
