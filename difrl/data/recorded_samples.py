"""Samples that exist already, with what is thought of them: preference pairs, and samples with rewards.

* pairs: {"prompt": "...", "chosen": "images/1.png", "rejected": "images/2.png"} a line,
* samples: {"prompt": "...", "image": "images/1.png", "reward": 0.5} a line; rows of one prompt belong together, and
  demonstrations have reward 1.

A language model's rows hold completions in place of paths, under "chosen", "rejected" and "text". All may hold "metadata",
"negative" and "weight", as a file of prompts does. A relative path starts at the file's folder. All images of a file have
one size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from difrl.config import RunConfig
from difrl.data.jsonl import PromptFileError, Row, describe_value, read_json_lines
from difrl.data.modality import MEDIA, Item, Medium
from difrl.data.prompts import Prompt, build_prompt, load_prompts


class Rows(Protocol):
    """The part of a recipe that names a file of samples, and says how many of them a step takes."""

    @property
    def train(self) -> str: ...
    @property
    def rows(self) -> str: ...
    @property
    def prompts_per_step(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def cache(self) -> int: ...


@dataclass(frozen=True)
class Example:
    """The samples of one prompt, which are compared with each other."""

    prompt: Prompt
    items: tuple[Item, ...]
    rewards: tuple[float, ...]
    places: tuple[str, ...]
    """file:line of each item."""


def load_examples(data: Rows, medium: Medium) -> list[Example]:
    """The examples of data.train; PromptFileError with a line for each problem."""
    path = Path(data.train)
    if path.suffix.lower() != ".jsonl":
        raise PromptFileError(f"{path}: rows: {data.rows} are read from a .jsonl file, found {path.suffix or 'none'}")
    form = _FORMS[data.rows]
    if not path.exists():
        raise PromptFileError(
            f"{data.train}: no such file, looked for {path.absolute()}; make one with `difrl pairs RECIPE --out FOLDER`, or "
            "write it"
        )
    read = form.read(_Reader(medium.key, medium.reader(path.parent)))
    examples = form.gather(read_json_lines(path, data.train, read))
    if not examples:
        raise PromptFileError(f"{path}: no row in it, expected at least one")
    for example in examples:
        if len(example.items) < data.group_size:
            raise PromptFileError(
                f"{path}: {example.prompt.text!r} has {len(example.items)} {medium.key}s, and group_size is "
                f"{data.group_size}; lower it, or add {medium.key}s of this prompt"
            )
    return examples


def training_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts that a run is trained on, whatever the rows of its file hold."""
    if config.data.rows == "prompts":
        return load_prompts(config.data.train)
    return [e.prompt for e in load_examples(config.data, MEDIA[config.likelihood.kind])]


@dataclass(frozen=True)
class _Reader:
    """How a medium's items are taken out of a row."""

    key: str
    take: Callable[[Row, str], Item]


def _pairs(reader: _Reader) -> Callable[[Row, str], Example]:
    def read(row: Row, place: str) -> Example:
        items = reader.take(row, "chosen"), reader.take(row, "rejected")
        return Example(build_prompt(row, place), items, (1.0, 0.0), (place, place))

    return read


def _samples(reader: _Reader) -> Callable[[Row, str], Example]:
    def read(row: Row, place: str) -> Example:
        item, reward = reader.take(row, reader.key), row.pop("reward", None)
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
            raise ValueError(f'"reward" must be a number, found {describe_value(reward)}; demonstrations have 1')
        return Example(build_prompt(row, place), (item,), (float(reward),), (place,))

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
            tuple(item for row in rows for item in row.items),
            tuple(reward for row in rows for reward in row.rewards),
            tuple(place for row in rows for place in row.places),
        )
        for rows in together.values()
    ]


@dataclass(frozen=True)
class _Form:
    """How the rows of a form are read, and which of them make an example."""

    read: Callable[[_Reader], Callable[[Row, str], Example]]
    gather: Callable[[Sequence[Example]], list[Example]]


_FORMS: Mapping[str, _Form] = {"pairs": _Form(_pairs, _each), "samples": _Form(_samples, _by_prompt)}
