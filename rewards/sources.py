"""Sources of models: a local folder or file, or a hub id."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")


def resolve_source(source: str) -> str:
    """Return a local path with `~` as the home folder, or a hub id. Raise FileNotFoundError if it can be neither."""
    path = os.path.expanduser(source)
    if not os.path.exists(path) and (problem := explain_missing(source)):
        found = problem.removeprefix("no folder ")
        raise FileNotFoundError(f"there is no file or folder {found}; give one, or a hub id such as owner/name")
    return path


def check_sources(reward: str, **sources: str) -> None:
    """Raise ValueError if a source of a reward, by its option, is neither a local path nor a hub id."""
    for option, source in sources.items():
        try:
            resolve_source(source)
        except FileNotFoundError as error:
            raise ValueError(f"reward '{reward}': {option}: {error}") from error


def explain_missing(source: str, known: Sequence[str] = ()) -> str | None:
    """Return why a source that is not a local path cannot be a hub id either; None if it can be one.

    The sentence suggests the nearest local folder, or the nearest of the `known` names. An id whose owner is the name of a
    folder here is a mistyped path, unless its model was fetched from the hub before.
    """
    owner, _, name = source.partition("/")
    if _HUB_ID.fullmatch(source) and (not os.path.isdir(owner) or _is_fetched(owner, name)):
        return None
    folder, last = os.path.split(os.path.expanduser(source).rstrip("/"))
    while folder and not os.path.isdir(folder):
        folder, last = os.path.split(folder)
    folders = [entry.name for entry in os.scandir(folder or ".") if entry.is_dir()] if len(last) < 256 else []
    near = [os.path.join(folder, match) for match in difflib.get_close_matches(last, folders, n=1)]
    near += difflib.get_close_matches(source, known, n=1)
    return f"no folder {source!r}" + (f", did you mean {' or '.join(map(repr, near))}?" if near else "")


def _is_fetched(owner: str, name: str) -> bool:
    """Return whether the hub's cache on this machine has a model."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    cache = os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))
    return os.path.isdir(os.path.join(os.path.expanduser(cache), f"models--{owner}--{name}"))
