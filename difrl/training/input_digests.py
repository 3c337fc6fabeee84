"""Digests of the files that a run reads beside its recipe, so that a resumed run names those that have changed.

    inputs.json  {"data.train": {"prompts.txt": "…"}, "data.train images": {"cat.png": "…", …},
                  "model.path": {"model_index.json": "…", …}, …}

A file has the SHA-256 of its content. Of a file above `WHOLE` bytes, such as weights, only `PIECES` pieces and the size
count, which takes milliseconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from difrl.config import RunConfig
from difrl.policies.model_paths import find_local
from difrl.runtime.files import atomic_write_text, digest_file

FILE = "inputs.json"
WHOLE = 8 * 2**20
PIECES = 16
PIECE = 2**16
Digests = Mapping[str, Mapping[str, str]]
"""Key of the recipe -> name of a file -> its digest."""


def digest_inputs(config: RunConfig, images: Mapping[str, Sequence[Path]]) -> Digests:
    """Return the digests of prompt files, modules of rewards and features, files in their options, and model folders.

    images: the image files that rows name, by the key of the rows' file. They are under "KEY images".
    """
    places = {key: place for key, place in _find_inputs(config) if place is not None and place.exists()}
    digests = {key: _digest_place(place) for key, place in places.items()}
    for key, files in ((key, files) for key, files in images.items() if files):
        # Relative to the rows' file, so that a folder may be moved.
        digests[f"{key} images"] = {os.path.relpath(file, places[key].parent): _digest(file) for file in files}
    return digests


def find_changes(before: Digests, now: Digests) -> list[str]:
    """Return the files that differ, as `key (file)`, of the keys that both have."""
    changes = []
    for key in [key for key in before if key in now]:
        names = sorted(before[key].keys() | now[key].keys())
        changes += [f"{key} ({name})" for name in names if before[key].get(name) != now[key].get(name)]
    return changes


def read_inputs(run: Path) -> Digests:
    """Return the digests that a run folder holds; {} if there are none or the file is damaged."""
    try:
        found = json.loads((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and all(isinstance(files, dict) for files in found.values())
    return found if whole else {}


def write_inputs(run: Path, digests: Digests) -> None:
    """Write the digests into a run folder."""
    atomic_write_text(run / FILE, json.dumps(digests, indent=1))


def _find_inputs(config: RunConfig) -> Iterator[tuple[str, Path | None]]:
    """Yield the keys of a recipe that name files, folders or modules, with their places."""
    yield "data.train", Path(config.data.train)
    yield "data.evaluation", None if config.data.evaluation is None else Path(config.data.evaluation)
    yield "rehearsal.train", None if config.rehearsal is None else Path(config.rehearsal.train)
    yield "model.path", find_local(config.model.path)
    if config.model.lora.warm_start is not None:
        yield "model.lora.warm_start", find_local(config.model.lora.warm_start)
    for name, teacher in config.teachers.items():
        yield f"teachers.{name}.path", find_local(teacher.path)
    for section, terms in (("rewards", config.rewards), ("watch", config.watch)):
        for member in [member for term in terms for member in term.members]:
            if member.import_ is not None:
                yield f"{section}.{member.label}.import", _find_module(member.import_)
            for option, value in member.options.items():
                if isinstance(value, str):
                    yield f"{section}.{member.label}.options.{option}", _find_option(value)
    for name in config.eval.diversity:
        if ":" in name:
            yield f"eval.diversity.{name}", _find_module(name)


def _find_option(text: str) -> Path | None:
    """Return the file or folder that an option names, None for any other text."""
    try:
        place = Path(text).expanduser()
        return place if text and place.exists() else None
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return None


def _find_module(path: str) -> Path | None:
    """Return the file of the module of an import path `package.module:name` or `package.module.name`."""
    name = path.replace(":", ".").rpartition(".")[0]
    try:
        spec = getattr(sys.modules.get(name), "__spec__", None) or importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _digest_place(place: Path) -> dict[str, str]:
    if place.is_file():
        return {place.name: _digest(place)}
    # Two levels, as a diffusers folder has them: an option may name any folder.
    files = sorted(path for pattern in ("*", "*/*") for path in place.glob(pattern) if path.is_file())
    return {path.relative_to(place).as_posix(): _digest(path) for path in files}


def _digest(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size <= WHOLE:
            return digest_file(path)
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as handle:
            for piece in range(PIECES):
                handle.seek((size - PIECE) * piece // (PIECES - 1))
                digest.update(handle.read(PIECE))
        return digest.hexdigest()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
