"""Recorded samples: files of preference pairs, and of samples with rewards.

* pairs: {"prompt": "...", "chosen": "images/1.png", "rejected": "images/2.png"} a line.
* samples: {"prompt": "...", "image": "images/1.png", "reward": 0.5} a line. Rows with the same prompt form a group.
  Demonstrations have reward 1.

An input image is "image" in a row of pairs, and "input_image" in a row of samples, whose "image" is the sample. Samples are
of one group if they have the same prompt and the same input image. Input images may have any size.

For a language model, completions replace the paths, under "chosen", "rejected" and "text". All rows may have "metadata",
"negative" and "weight", as in a file of prompts. Relative paths start at the file's folder. All images of a file must have
the same size.
"""

from __future__ import annotations

import filecmp
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from difrl.config import DataConfig, RehearsalConfig
from difrl.data.jsonl import DataFileError, JsonObject, describe_value, join_problems, read_json_lines
from difrl.data.modality import Item, Modality
from difrl.data.prompts import IMAGE, INPUT_IMAGE, Prompt, build_prompt, check_all_or_none, check_images


@dataclass(frozen=True)
class RecordedGroup:
    """The recorded samples of one prompt, which are compared with each other."""

    prompt: Prompt
    items: tuple[Item, ...]
    rewards: tuple[float, ...]
    places: tuple[str, ...]
    """Place of each item, as file:line."""


def load_recorded_samples(data: DataConfig | RehearsalConfig, modality: Modality) -> list[RecordedGroup]:
    """Load the groups of data.train. Raise DataFileError with a line for each problem."""
    path = Path(data.train)
    if path.suffix.lower() != ".jsonl":
        raise DataFileError(f"{path}: rows: {data.rows} are read from a .jsonl file, found {path.suffix or 'none'}")
    if not path.exists():
        raise DataFileError(
            f"{data.train}: no such file, looked for {path.absolute()}; make one with `difrl pairs RECIPE --out FOLDER`, or "
            "write it"
        )
    read_item, image_key = modality.item_reader(path.parent), IMAGE if data.rows == "pairs" else INPUT_IMAGE
    build = partial(build_prompt, folder=path.parent, image_key=image_key if modality.takes_images else None)
    if data.rows == "pairs":
        rows = read_json_lines(path, data.train, partial(_read_pair, read_item, build))
    else:
        rows = read_json_lines(path, data.train, partial(_read_sample, read_item, modality.key, build))
    check_all_or_none(data.train, [row.prompt for row in rows])
    groups = rows if data.rows == "pairs" else _merge_by_prompt(rows)
    items = [item for group in groups for item in zip(group.places, group.items, strict=True)]
    check_images([group.prompt for group in groups])
    if problems := modality.find_problems(items):
        raise DataFileError(join_problems(problems, "images"))
    if not groups:
        raise DataFileError(f"{path}: no row in it, expected at least one")
    for group in groups:
        if len(group.items) < data.group_size:
            raise DataFileError(
                f"{path}: {group.prompt.text!r} has {len(group.items)} {modality.key}s, and group_size is "
                f"{data.group_size}; lower it, or add {modality.key}s of this prompt"
            )
    return groups


def _read_pair(
    read_item: Callable[[JsonObject, str], Item],
    build: Callable[[JsonObject, str], Prompt],
    row: JsonObject,
    place: str,
) -> RecordedGroup:
    items = read_item(row, "chosen"), read_item(row, "rejected")
    if _is_same(*items):
        raise ValueError('"chosen" and "rejected" are the same, so neither is better; remove the row')
    return RecordedGroup(build(row, place), items, (1.0, 0.0), (place, place))


def _is_same(one: Item, other: Item) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return filecmp.cmp(one, other, shallow=False)
    return one == other


def _read_sample(
    read_item: Callable[[JsonObject, str], Item],
    key: str,
    build: Callable[[JsonObject, str], Prompt],
    row: JsonObject,
    place: str,
) -> RecordedGroup:
    item, reward = read_item(row, key), row.pop("reward", None)
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise ValueError(f'"reward" must be a number, found {describe_value(reward)}; demonstrations have 1')
    return RecordedGroup(build(row, place), (item,), (float(reward),), (place,))


def _merge_by_prompt(rows: Sequence[RecordedGroup]) -> list[RecordedGroup]:
    """Return one group a prompt and input image, in the order of the file. Its metadata are those of its first row."""
    by_prompt: dict[tuple[str, Path | None], list[RecordedGroup]] = {}
    for row in rows:
        by_prompt.setdefault((row.prompt.text, row.prompt.image), []).append(row)
    return [
        RecordedGroup(
            same[0].prompt,
            tuple(item for row in same for item in row.items),
            tuple(reward for row in same for reward in row.rewards),
            tuple(place for row in same for place in row.places),
        )
        for same in by_prompt.values()
    ]
