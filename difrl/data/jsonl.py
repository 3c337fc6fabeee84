"""Read text and JSON-lines files of prompts and samples. Each problem is reported with its file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from difrl.runtime.errors import UserError
from difrl.runtime.suggestions import did_you_mean

T = TypeVar("T")
JsonObject = dict[str, object]
"""The object of a line, as JSON."""

SUFFIXES = (".txt", ".jsonl")
LISTED = 10
"""Problems of a file that are listed; further ones are counted."""


class DataFileError(UserError):
    """The problems of a file of prompts or samples, each with its line."""


def read_text(path: Path, name: str) -> str:
    """Return the text of a UTF-8 file. Raise DataFileError if it cannot be read; messages call the file `name`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        folder = path.parent
        files = [file.name for file in folder.iterdir() if file.suffix in SUFFIXES] if folder.is_dir() else []
        near = did_you_mean(path.name, files, "{}")
        hint = f"; did you mean {(folder / near).as_posix()}?" if near else ""
        raise DataFileError(f"{name}: no such file, looked for {path.absolute()}{hint}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataFileError(f"{name}:{line}: not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise DataFileError(f"{name}: cannot be read: {error.strerror}") from error


def read_json_lines(path: Path, name: str, build: Callable[[JsonObject, str], T]) -> list[T]:
    """Return `build(row, place)` for each object of a .jsonl file, where `place` is NAME:LINE. Blank lines are skipped.

    Raise DataFileError with all ValueErrors, those of `build` included.
    """
    built, problems = [], []
    # Not splitlines: JSON strings may contain U+2028 and similar characters unescaped.
    for number, line in enumerate(read_text(path, name).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            built.append(build(_parse_row(line), place))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise DataFileError(join_problems(problems, "lines"))
    return built


def join_problems(problems: Sequence[str], kind: str) -> str:
    """Return the first problems, one a line, and the number of further ones. `kind` is the noun for these."""
    more = [f"and {len(problems) - LISTED} {kind} more"] if len(problems) > LISTED else []
    return "\n".join([*problems[:LISTED], *more])


def quote(key: str) -> str:
    """Return a key in double quotes, as JSON has it."""
    return f'"{key}"'


def describe_keys(row: JsonObject) -> str:
    """Return the keys of a row for a message."""
    return ", ".join(map(quote, row)) or "no keys"


def describe_value(value: object) -> str:
    """Return a JSON value for a message: as JSON, or "an object" or "a list"."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value, ensure_ascii=False)


def _parse_row(line: str) -> JsonObject:
    try:
        row = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at column {error.colno}: {error.msg}") from error
    if not isinstance(row, dict):
        raise ValueError(f'expected an object such as {{"prompt": "a red circle"}}, found {describe_value(row)}')
    return row


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON; expected a finite number, or null")


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> JsonObject:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'"{twice}" is given twice; remove one')
    return row
