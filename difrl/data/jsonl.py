"""Read text and JSON-lines files of prompts and samples. Each problem is reported with its file and line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from difrl.runtime import files
from difrl.runtime.errors import UserError
from difrl.runtime.suggestions import did_you_mean

T = TypeVar("T")
JsonObject = dict[str, object]
"""The object of a line, as JSON."""

SUFFIXES = (".txt", ".jsonl")
LISTED = 10
"""Problems of a file that are listed; further ones are counted."""
LARGEST, ROWS, LONGEST = 100_000_000, 1_000_000, 1_000_000
"""Most bytes and lines of a file, whose rows are kept in memory, and most characters of a line."""


class DataFileError(UserError):
    """The problems of a file of prompts or samples, each with its line."""


def read_text(path: Path, name: str) -> str:
    """Return the text of a UTF-8 file. Raise DataFileError if it cannot be read; messages call the file `name`."""
    try:
        if os.path.isfile(path) and (size := path.stat().st_size) > LARGEST:
            raise DataFileError(
                f"{name}: {size / 1e6:.0f} MB, expected at most {LARGEST / 1e6:.0f} MB, because all rows are kept in memory; "
                "take a part of them"
            )
        text = files.read_text(path, name, LARGEST + 1, DataFileError)
    except FileNotFoundError as error:
        folder = path.parent
        names = [file.name for file in folder.iterdir() if file.suffix in SUFFIXES] if folder.is_dir() else []
        near = did_you_mean(path.name, names, "{}")
        hint = f"; did you mean {(folder / near).as_posix()}?" if near else ""
        raise DataFileError(f"{name}: no such file, looked for {path.absolute()}{hint}") from error
    lines = text.split("\n")
    if len(lines) > ROWS:
        raise DataFileError(f"{name}: {len(lines):,} lines, expected at most {ROWS:,}; take a part of them")
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST:
            raise DataFileError(f"{name}:{number}: a line of {len(line):,} characters, expected at most {LONGEST:,}")
        if "\0" in line:
            raise DataFileError(f"{name}:{number}: found the character U+0000, which text does not contain; remove it")
    return text


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
        if "\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            "half of a surrogate pair (\\ud800 to \\udfff), which is not a character; remove it"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("lists and objects are nested too deep; expected a few levels") from error
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
