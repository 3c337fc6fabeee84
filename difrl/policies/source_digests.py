"""Digests of the files of a model's parts.

    ~/.cache/difrl/digests/7ac0….txt    the SHA-256 of a model file, which takes seconds to compute

The folder can be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from difrl.runtime.files import digest_file
from difrl.runtime.paths import cache_folder

Source = tuple[str, str, str | None]
"""Place of a part of a pipeline: a folder or hub id, the folder in it, and the revision."""


def digest_source(source: Source) -> list[str]:
    """Return digests of the files of a part, or the commit of a hub's repository, which determines them.

    Raise FileNotFoundError if there are none.
    """
    path, name, revision = source
    if os.path.isdir(path):
        files = sorted(file for file in Path(path, name).rglob("*") if file.is_file())
        if not files:
            raise FileNotFoundError(name)
        return [name, *(f"{file.relative_to(path)} {_digest_once(file)}" for file in files)]
    return [name, path, find_commit(path, name, revision)]


def find_commit(path: str, name: str, revision: str | None) -> str:
    """Return the commit of the files of a hub's repository that were loaded for a part. FileNotFoundError: none were."""
    for index in ("model_index.json", "modular_model_index.json", f"{name}/config.json"):
        found = try_to_load_from_cache(path, index, revision=revision)
        if isinstance(found, str):
            snapshots = next(parent for parent in Path(found).parents if parent.name == "snapshots")
            return Path(found).relative_to(snapshots).parts[0]
    raise FileNotFoundError(path)


def _digest_once(file: Path) -> str:
    """Return the SHA-256 of a file, from the cache if it was computed before and the file has not changed since."""
    cache, status = cache_folder(), file.stat()
    if cache is None:
        return digest_file(file)
    identity = [str(file.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    kept = cache / "digests" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.txt"
    with suppress(OSError):
        if len(found := kept.read_text()) == 64:
            return found
    digest = digest_file(file)
    if status.st_size > 2**20:
        with suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(digest)
    return digest
