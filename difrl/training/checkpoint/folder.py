"""The folder of a checkpoint: its name, its digests, and the places of a run's checkpoints.

A checkpoint is written aside and renamed, so a folder of that name is complete. Later damage is found by the digests in
SHA256SUMS (`sha256sum -c` reads it too), and in checkpoints of earlier versions by the sizes in state.json.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from difrl.runtime.errors import UserError
from difrl.runtime.files import atomic_write_text, digest_file

PREFIX = "step-"
RESULT = "checkpoints/result.json"
DIGESTS = "SHA256SUMS"
_NAME = re.compile(rf"{PREFIX}\d+")


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint with files that are not as they were written."""

    def __init__(self, place: Path, problem: str) -> None:
        self.place, self.problem = place, problem
        others = ", ".join(p.name for p in find_all(place.parent.parent) if p != place) or "no other"
        super().__init__(
            f"the checkpoint {place} is damaged: {problem}. --resume passes it over; the run has {others} beside it"
        )


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"{PREFIX}{step:06d}"


def find_latest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run folder, if there is one."""
    found = find_all(run)
    return found[-1] if found else None


def find_all(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first. Copies such as step-000050-best are left out."""
    try:
        places = list((run / "checkpoints").iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"cannot read {run / 'checkpoints'}: {error.strerror}; make it readable for this user"
        ) from error
    return sorted((place for place in places if _NAME.fullmatch(place.name)), key=parse_step)


def find_whole(run: Path) -> tuple[Path | None, list[DamagedCheckpoint]]:
    """Return the newest checkpoint without damage, None for a run without checkpoints, and the damaged ones that are newer.

    Raise CheckpointError if none of several is whole, or if one cannot be read.
    """
    damaged: list[DamagedCheckpoint] = []
    for place in reversed(find_all(run)):
        try:
            check(place)
        except DamagedCheckpoint as error:
            damaged.append(error)
        else:
            return place, damaged
    if damaged:
        found = "; ".join(f"{error.place.name}: {error.problem}" for error in damaged)
        raise CheckpointError(
            f"no checkpoint of {run} is whole ({found}); restore the files from a copy, or start a new run with "
            "output_dir=runs/NAME"
        )
    return None, []


def set_aside(place: Path) -> Path:
    """Rename a damaged checkpoint, so that the run does not continue from it and does not remove it. Return its new place."""
    names = (f"{place.name}-damaged" + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
    free = next(place.with_name(name) for name in names if not place.with_name(name).exists())
    return place.rename(free)


def parse_step(place: Path | None) -> int:
    """Return the number of steps of a checkpoint, from its name; 0 for None."""
    return 0 if place is None else int(place.name.removeprefix(PREFIX))


def find_result(run: Path) -> Path | None:
    """Return the checkpoint with the result of the run: the newest, or the one that the guard chose."""
    mark = run / RESULT
    if not mark.is_file():
        return find_latest(run)
    try:
        return checkpoint_folder(run, int(json.loads(mark.read_text())["step"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{mark} cannot be read ({error}); it names the step that the guard chose, and --resume writes it again"
        ) from error


def mark_result(run: Path, step: int | None) -> None:
    """Mark the checkpoint of a step as the result; None: the newest, which is the default."""
    if step is None:
        (run / RESULT).unlink(missing_ok=True)
    else:
        atomic_write_text(run / RESULT, json.dumps({"step": step}))


def remove_partial(run: Path) -> None:
    """Remove what a process left that was killed while it wrote or removed a checkpoint."""
    for left in checkpoint_folder(run, 0).parent.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def remove(place: Path) -> None:
    """Remove a checkpoint. Its name goes first, so that a process that is killed here leaves no damaged one."""
    if place.exists():
        old = place.with_name(f".{place.name}.old.partial")
        os.replace(place, old)
        shutil.rmtree(old)


def read_state(place: Path) -> dict[str, Any]:
    """Read state.json. Raise DamagedCheckpoint unless it is as written and every file is there in its full length."""
    with readable(place):
        if not place.is_dir():
            existing = ", ".join(p.name for p in find_all(place.parent.parent)) or "none"
            raise CheckpointError(f"there is no checkpoint {place}; the run has {existing}")
        return _read_state(place)


def check(place: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Return the state of a checkpoint. Raise DamagedCheckpoint if a file is not as written.

    names: the files that are compared with their digests, all by default. Checkpoints of earlier versions have no digests.
    """
    state = read_state(place)
    with readable(place):
        for name, digest in _read_digests(place).items():
            if (names is None or name in names) and digest_file(place / name) != digest:
                raise DamagedCheckpoint(place, f"{name} is not as it was written (its SHA-256 differs)")
    return state


@contextmanager
def readable(place: Path) -> Iterator[None]:
    """Raise CheckpointError for a file that is there and that this user may not read: it is no damage."""
    try:
        yield
    except PermissionError as error:
        raise CheckpointError(
            f"cannot read {error.filename or place}: {error.strerror}; make it readable for this user, and continue"
        ) from error
    except OSError as error:
        raise DamagedCheckpoint(place, f"{error.filename or 'a file'} cannot be read ({error})") from error


def _read_state(place: Path) -> dict[str, Any]:
    digests = _read_digests(place)
    if "state.json" in digests and digest_file(place / "state.json") != digests["state.json"]:
        raise DamagedCheckpoint(place, "state.json is not as it was written (its SHA-256 differs)")
    try:
        state: dict[str, Any] = json.loads((place / "state.json").read_text())
        for name, size in state["files"].items():
            if not (place / name).exists():
                raise DamagedCheckpoint(place, f"{name} is missing")
            if (found := (place / name).stat().st_size) != size:
                raise DamagedCheckpoint(place, f"{name} has {found} bytes where {size} were written")
        if _NAME.fullmatch(place.name) and state["step"] != parse_step(place):
            raise DamagedCheckpoint(place, f"state.json is of step {state['step']}")
        if digests.keys() != ({*state["files"], "state.json"} if "digests" in state else set()):
            raise DamagedCheckpoint(place, f"{DIGESTS} does not list the files of the checkpoint")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(place, f"state.json cannot be read ({error})") from error
    return state


def _read_digests(place: Path) -> dict[str, str]:
    """Return the digest of every file, by name; {} without the file of digests, as in a checkpoint of an earlier version."""
    path = place / DIGESTS
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = [line.partition("  ") for line in text.splitlines(keepends=True)]
    return {name.removesuffix("\n"): digest for digest, _, name in lines if name.endswith("\n")}
