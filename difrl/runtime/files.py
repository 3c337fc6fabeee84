"""Text files that users name, and files that are written aside and renamed.

A full disk or a killed process leaves the earlier file whole.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from difrl.runtime.errors import MissingFile, UserError


def check_exist(files: Iterable[Path]) -> None:
    """Raise MissingFile unless all of these files exist."""
    for file in files:
        if not file.is_file():
            raise MissingFile(f"{file}: there is no such file")


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_text(path: Path, name: str, most: int, error_class: type[UserError]) -> str:
    """Return the first `most` bytes of a UTF-8 file.

    Raise `error_class`, whose message begins with `name`, if it cannot be read, and FileNotFoundError if there is no file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a device or a pipe"
        raise error_class(f"{name}: {kind}, expected a file with text")
    try:
        with path.open("rb") as file:
            data = file.read(most)
        # A cut may divide the last character.
        return codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=len(data) < most)
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise error_class(f"{name}:{line}: not UTF-8 text; save the file as UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        problem = error.strerror if isinstance(error, OSError) else error
        raise error_class(f"{name}: cannot be read: {problem}") from error


def flush_to_disk(path: Path) -> None:
    """Return when the content of a file is on the disk, where a crash of the machine does not lose it."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` for the block to write. It takes the place of `path` unless the block raises."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        flush_to_disk(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with `atomic_write`."""
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")
