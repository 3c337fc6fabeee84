"""Prompts from text files, JSON lines and built-in tasks.

* `prompts.txt`: one prompt a line. Blank lines and comments are skipped. A comment begins with a `#` that is alone or
  followed by a space (`#nofilter` is a prompt).
* `prompts.jsonl`: an object a line, {"prompt": "...", "metadata": {...}, "negative": "...", "weight": 2}. Only the
  prompt is required. In a line without "metadata" all other keys are metadata, as in GenEval's published file, which has
  "tag" and "include" beside "prompt".
* `shapes:train`, `shapes:eval`, `shapes:all`, and the same for `arithmetic`: a built-in task and a part of its split.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difrl.data.jsonl import DataFileError, JsonObject, describe_keys, describe_value, quote, read_json_lines, read_text
from difrl.runtime.suggestions import did_you_mean
from difrl.tasks import arithmetic, shapes


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, with metadata for rewards, a negative prompt and a weight that sets how often it is drawn."""

    text: str
    metadata: Mapping[str, Any]
    negative: str | None = None
    weight: float = 1.0
    place: str = field(default="", compare=False)
    """Place for messages: file:line, or its number in a built-in set."""


_TASKS: Mapping[str, Callable[[Any], Sequence[shapes.ShapesPrompt | arithmetic.Problem]]] = {
    "shapes": shapes.prompts,
    "arithmetic": arithmetic.list_problems,
}
_BUILT_IN = {f"{task}:{split}": (task, split) for task in _TASKS for split in ("train", "eval", "all")}


def load_prompts(source: str, base: Path | None = None) -> list[Prompt]:
    """Load the prompts of a .txt or .jsonl file, or of a built-in set. Relative paths start at `base`.

    Raise DataFileError with a line for each problem.
    """
    path = Path(base or "", source)
    match path.suffix.lower():
        case ".txt":
            prompts = _parse_text(source, read_text(path, source))
        case ".jsonl":
            prompts = read_json_lines(path, source, build_prompt)
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


def build_prompt(row: JsonObject, place: str) -> Prompt:
    """Build the prompt of a row, with its negative prompt, weight and metadata. ValueError if the row has no valid prompt."""
    text, negative, weight = row.get("prompt"), row.get("negative"), row.get("weight", 1)
    if "prompt" not in row:
        raise ValueError(f'"prompt" is missing, found {describe_keys(row)}')
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"prompt" must be text that is not empty, found {describe_value(text)}')
    if negative is not None and not isinstance(negative, str):
        raise ValueError(f'"negative" must be text or null, found {describe_value(negative)}')
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f'"weight" must be a number above 0, found {describe_value(weight)}')
    if not 0 < weight <= sys.float_info.max:
        raise ValueError(f'"weight" must be a number above 0, found {weight}')
    return Prompt(text, _metadata(row), negative, float(weight), place)


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
