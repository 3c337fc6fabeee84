"""Prompts: from text files, from JSON lines, from built-in worlds; and which of them a step trains on.

* `prompts.txt`: one prompt a line. Blank lines are left out, and so are comments: a `#` that stands alone or
  before a space (`#nofilter` is a prompt).
* `prompts.jsonl`: an object a line, {"prompt": "...", "metadata": {...}, "negative": "...", "weight": 2}; all
  but the prompt may be missing. In a line without "metadata" every other key is metadata, as in the file that
  GenEval publishes, where "tag" and "include" stand beside "prompt".
* `shapes:train`, `shapes:eval`, `shapes:all`, and the same of `arithmetic`: a built-in world and the side of its split.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from difrl.tasks import arithmetic, shapes
from samplers.noise import stable_seed

T = TypeVar("T")

SHOWN = 10
"""Problems of a file that are listed; the others are counted."""


@dataclass(frozen=True)
class Prompt:
    """What is asked for, what a reward may need to know about it, and how often it is drawn."""

    text: str
    metadata: Mapping[str, Any]
    negative: str | None = None
    weight: float = 1.0
    place: str = field(default="", compare=False)
    """Where it stands, for messages: file:line, or its number in a built-in set."""


class PromptFileError(ValueError):
    """What is wrong with a prompt file, each problem with its line."""


def load_prompts(source: str, base: Path | None = None) -> list[Prompt]:
    """The prompts of a .txt or .jsonl file (a relative path is taken from `base`), or of a built-in set."""
    path = Path(base or "", source)
    reader = _READERS.get(path.suffix.lower())
    if reader is not None:
        prompts = reader(source, read_text(path, source))
        if not prompts:
            raise PromptFileError(f"{source}: no prompt in it, expected at least one")
        return prompts
    if source in _BUILT_IN:
        return _built_in(source)
    found = "there is no built-in set of that name" if ":" in source else "expected a .txt or .jsonl file"
    near = difflib.get_close_matches(source, _BUILT_IN, n=1)
    hint = f"did you mean {near[0]}?" if near else f"Built-in sets: {', '.join(_BUILT_IN)}"
    raise PromptFileError(f"{source}: {found}; {hint}")


def read_text(path: Path, source: str) -> str:
    """The text of a data file, or a PromptFileError that says why there is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        folder = path.parent
        files = [file.name for file in folder.iterdir() if file.suffix in _READERS] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, files, n=1)
        hint = f"; did you mean {(folder / near[0]).as_posix()}?" if near else ""
        raise PromptFileError(f"{source}: no such file, looked for {path.absolute()}{hint}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PromptFileError(f"{source}:{line}: not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise PromptFileError(f"{source}: cannot be read: {error.strerror}") from error


def _from_text(source: str, text: str) -> list[Prompt]:
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    return [Prompt(line, {}, place=f"{source}:{n}") for n, line in lines if line and line.split()[0] != "#"]


def json_lines(source: str, text: str, read: Callable[[dict[str, Any], str], T]) -> list[T]:
    """What `read` makes of each object of a .jsonl file and its place, file:line; its ValueErrors are told together."""
    found, problems = [], []
    # Not splitlines: JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{source}:{number}"
        try:
            found.append(read(_row(line), place))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise PromptFileError(told(problems, "lines"))
    return found


def told(problems: Sequence[str], kind: str) -> str:
    """A line for each of the first problems, and how many of what kind there are beyond."""
    more = [f"and {len(problems) - SHOWN} {kind} more"] if len(problems) > SHOWN else []
    return "\n".join([*problems[:SHOWN], *more])


def _from_json_lines(source: str, text: str) -> list[Prompt]:
    return json_lines(source, text, prompt_of)


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at column {error.colno}: {error.msg}") from error
    if not isinstance(row, dict):
        raise ValueError(f'expected an object such as {{"prompt": "a red circle"}}, found {named(row)}')
    return row


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON; expected a finite number, or null")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'"{twice}" is given twice; remove one')
    return row


def prompt_of(row: dict[str, Any], place: str) -> Prompt:
    """The prompt of a row at a place, with its negative, weight and metadata; ValueError if there is none."""
    text, negative, weight = row.get("prompt"), row.get("negative"), row.get("weight", 1)
    if "prompt" not in row:
        raise ValueError(f'"prompt" is missing, found {", ".join(map(quoted, row)) or "no keys"}')
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"prompt" must be text that is not empty, found {named(text)}')
    if negative is not None and not isinstance(negative, str):
        raise ValueError(f'"negative" must be text or null, found {named(negative)}')
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f'"weight" must be a number above 0, found {named(weight)}')
    if not 0 < weight <= sys.float_info.max:
        raise ValueError(f'"weight" must be a number above 0, found {weight}')
    return Prompt(text, _metadata(row), negative, float(weight), place)


def _metadata(row: dict[str, Any]) -> Mapping[str, Any]:
    if "negative_prompt" in row:
        raise ValueError('"negative_prompt" is not a key; write "negative"')
    if "metadata" not in row:
        # GenEval's rows are metadata as a whole, the prompt included; a prompt alone says nothing more.
        others = {key: value for key, value in row.items() if key not in ("negative", "weight")}
        return others if len(others) > 1 else {}
    if unknown := [key for key in row if key not in ("prompt", "metadata", "negative", "weight")]:
        raise ValueError(f'unknown key {quoted(unknown[0])}; put it inside "metadata", or remove it')
    metadata = row["metadata"]
    if not isinstance(metadata, dict):
        raise ValueError(f'"metadata" must be an object, found {named(metadata)}')
    return metadata


def quoted(word: str) -> str:
    return f'"{word}"'


def named(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value, ensure_ascii=False)


_READERS: Mapping[str, Callable[[str, str], list[Prompt]]] = {".txt": _from_text, ".jsonl": _from_json_lines}
_WORLDS: Mapping[str, Callable[[Any], Sequence[shapes.Prompt | arithmetic.Problem]]] = {
    "shapes": shapes.prompts,
    "arithmetic": arithmetic.problems,
}
_BUILT_IN = {f"{world}:{split}": (world, split) for world in _WORLDS for split in ("train", "eval", "all")}


def _built_in(name: str) -> list[Prompt]:
    world, split = _BUILT_IN[name]
    asked = enumerate(_WORLDS[world](split), 1)
    return [Prompt(one.text, one.metadata, place=f"{name}, number {number}") for number, one in asked]


class PromptOrder:
    """The prompts of each step: a function of seed and step alone, so that resuming needs nothing else.

    With equal weights a run walks through one shuffled epoch after the other, across step boundaries: after
    E epochs every prompt was trained on E times. Where a step holds the end of one epoch and the beginning of
    the next, the beginning leaves out what the end has, so that no prompt is twice in a step (unless a step
    is larger than the set).

    With unequal weights each step is drawn on its own, without replacement, and a prompt is in it with
    probability per_step · weight / Σ weights (systematic sampling in a shuffled order, Madow 1949). A prompt
    whose share would be more than 1 is in every step, and the others share the rest. Where a step is larger
    than the set, prompts repeat in proportion to their weights.
    """

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int) -> None:
        if not prompts or per_step < 1:
            raise ValueError(f"{len(prompts)} prompts and {per_step} a step, expected at least one of both")
        self.count, self.per_step, self.seed = len(prompts), per_step, seed
        weights = np.array([prompt.weight for prompt in prompts], dtype=np.float64)
        self.shares = None if (weights == weights[0]).all() else _shares(weights, per_step)

    def step(self, step: int) -> list[int]:
        """Numbers of the prompts of a step, `per_step` of them."""
        if self.shares is not None:
            return self._drawn(step, self.shares)
        start = step * self.per_step
        epochs = range(start // self.count, (start + self.per_step - 1) // self.count + 1)
        walked = np.concatenate([self._epoch(epoch) for epoch in epochs])
        first = start - epochs[0] * self.count
        return [int(index) for index in walked[first : first + self.per_step]]

    def _uniform(self, use: str, number: int, count: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(stable_seed(self.seed, number, use)))
        return generator.random(count)

    def _shuffled(self, use: str, number: int) -> np.ndarray:
        # The order of uniform numbers, not Generator.permutation, whose stream numpy may change.
        return np.argsort(self._uniform(use, number, self.count), kind="stable")

    def _epoch(self, epoch: int) -> np.ndarray:
        """The order of one epoch [count].

        It depends on the epoch before it where a step spans both, and so on back to an epoch that begins
        with a step: at most per_step epochs.
        """
        first = epoch
        while self.count >= self.per_step and (first * self.count) % self.per_step:
            first -= 1
        order = self._shuffled("epoch", first)
        for number in range(first + 1, epoch + 1):
            begun = (number * self.count) % self.per_step
            following = self._shuffled("epoch", number)
            fresh = following[~np.isin(following, order[-begun:])]
            head = fresh[: self.per_step - begun]
            order = np.concatenate([head, following[~np.isin(following, head)]])
        return order

    def _drawn(self, step: int, shares: np.ndarray) -> list[int]:
        order = self._shuffled("prompts", step)
        # Points one apart fall into intervals as long as the shares: an interval is hit by its length.
        ends = np.cumsum(shares[order])
        offset = self._uniform("offset", step, 1)
        points = (offset + np.arange(self.per_step)) * (ends[-1] / self.per_step)
        hit = np.searchsorted(ends, points, side="right").clip(max=self.count - 1)
        return [int(index) for index in order[hit]]


def _shares(weights: np.ndarray, per_step: int) -> np.ndarray:
    """How often a step holds each prompt in the mean: by the weights, and at most once if that can be."""
    certain = np.zeros(len(weights), dtype=bool)
    while True:
        rest = np.where(certain, 0.0, weights)
        shares = np.where(certain, 1.0, (per_step - certain.sum()) * rest / max(rest.sum(), 1e-300))
        over = (shares > 1) & ~certain
        if per_step > len(weights) or not over.any():
            return shares
        certain |= over
