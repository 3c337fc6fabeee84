"""A folder with the trained parts of a pipeline, and a reference to the model that has the other parts.

    runs/NAME/model/  base.json     {"path": …, "revision": …, "trained": [part, …], "digests": {part: SHA-256, …}}
                      transformer/  a trained part, as in a folder of the whole pipeline

difrl opens it as a whole pipeline, through a folder of links to both places. `difrl merge` writes a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from difrl.policies.errors import ModelError
from difrl.policies.model_paths import ASSETS, find_local, resolve
from difrl.policies.source_digests import digest_source, find_commit
from difrl.runtime.files import atomic_write_text
from difrl.runtime.paths import cache_folder

REFERENCE = "base.json"


@dataclass(frozen=True)
class BaseReference:
    """The model that a folder of trained parts belongs to."""

    path: str
    """A folder or hub id."""
    revision: str | None
    """Revision of a hub id: the commit, if it is known."""
    trained: Sequence[str]
    """Names of the parts that the folder has itself."""
    digests: dict[str, str] = field(default_factory=dict)
    """Name of another part of a local model -> a digest of its files. Those of a hub id are determined by the commit."""


def read_reference(folder: Path) -> BaseReference | None:
    """Return the reference of a folder; None if it has none. Raise ModelError if it cannot be read."""
    file = folder / REFERENCE
    try:
        return BaseReference(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{file} cannot be read ({error}); expected the path, revision, trained parts and digests of the model that the "
            "folder belongs to, as `difrl train` writes them"
        ) from error


def write_reference(
    folder: Path, path: str, revision: str | None, trained: Sequence[str], others: Iterable[str]
) -> None:
    """Write the reference of a folder to a model, which is a folder or a hub id. others: the parts that are taken from it."""
    place = find_local(path)
    if place is None:
        reference = BaseReference(path, _find_commit(path, trained[0], revision), list(trained))
    elif (found := read_reference(place)) is not None:  # trained from such a folder, whose base has the others too
        reference = found
    else:
        digests = {name: _digest(place, name) for name in others if (place / name).is_dir()}
        written = path if ASSETS in place.parents else os.path.abspath(place)
        reference = BaseReference(written, None, list(trained), digests)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / REFERENCE, json.dumps(asdict(reference), indent=2) + "\n")


def _find_commit(path: str, name: str, revision: str | None) -> str | None:
    try:
        return find_commit(path, name, revision)
    except FileNotFoundError:
        return revision


def _digest(place: Path, name: str) -> str:
    return hashlib.sha256(json.dumps(digest_source((str(place), name, None))).encode()).hexdigest()


def find_pipeline(path: str) -> str:
    """Return the place of a pipeline as `resolve` does; for a folder of trained parts, a folder of links to the whole.

    Raise ModelError if the base of such a folder is not there, or is not as it was when the run ended.
    """
    place = resolve(path)
    reference = read_reference(Path(place))
    return place if reference is None else str(_link(Path(place), reference))


def _link(folder: Path, reference: BaseReference) -> Path:
    base = _find_base(folder, reference)
    for name, digest in reference.digests.items():
        if not (base / name).is_dir() or _digest(base, name) != digest:
            raise ModelError(
                f"{folder} belongs to the model {base}, whose {name} is not as it was when the run ended; restore it, or "
                f"write the path of the original model into {folder / REFERENCE}"
            )
    links = {file.name: file.resolve() for file in sorted(base.iterdir()) if file.name not in reference.trained}
    links |= {name: (folder / name).resolve() for name in reference.trained}
    if absent := [name for name, place in links.items() if not place.exists()]:
        raise ModelError(f"{folder} has no {absent[0]}, which {REFERENCE} names; copy the folder again")
    content = json.dumps({name: str(place) for name, place in links.items()})
    place = _links_folder() / hashlib.sha256(content.encode()).hexdigest()[:16]
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=place.parent))
        for name, target in links.items():
            (aside / name).symlink_to(target)
        try:
            aside.rename(place)
        except OSError:  # another process was faster
            shutil.rmtree(aside)
    return place


def _links_folder() -> Path:
    """Return the folder of folders of links, which can be removed whenever no run is in progress."""
    return (cache_folder() or Path(tempfile.gettempdir()) / "difrl") / "models"


def _find_base(folder: Path, reference: BaseReference) -> Path:
    """Return the local folder of a base, which may have to be downloaded."""
    if (place := find_local(reference.path)) is not None:
        return place
    advice = f"restore it, or write its new path into {folder / REFERENCE}"
    if os.path.isabs(reference.path):
        raise ModelError(f"{folder} holds only trained parts, and its base {reference.path} is not there; {advice}")
    try:
        try:
            found = DiffusionPipeline.download(reference.path, revision=reference.revision, use_safetensors=True)
        except OSError:  # a modular pipeline
            found = snapshot_download(reference.path, revision=reference.revision)
    except Exception as error:  # the hub library has many error classes, all with this meaning
        raise ModelError(
            f"{folder} holds only trained parts, and its base {reference.path} cannot be fetched from the hub: {error}; {advice}"
        ) from error
    return Path(found)
