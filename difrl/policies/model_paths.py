"""Resolution of `model.path`: a local folder, a shipped model, or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from difrl.policies.errors import ModelError
from difrl.runtime.paths import PACKAGE

ASSETS = PACKAGE / "assets"


@dataclass(frozen=True)
class ModelFormat:
    """A format of models, as messages describe it."""

    folder: str
    """The folder in words."""
    marker: str
    """The file that identifies such a folder."""
    example: str
    """An example of a hub id."""


PIPELINE = ModelFormat("a diffusers folder", "model_index.json", "stabilityai/stable-diffusion-3.5-medium")


LANGUAGE_MODEL = ModelFormat("a transformers folder", "tokenizer_config.json", "Qwen/Qwen3-0.6B")


def find_local(path: str) -> Path | None:
    """A local folder, or that of a shipped model."""
    return next((place for place in (Path(path), ASSETS / path) if place.is_dir()), None)


def is_local_path(path: str) -> bool:
    """Whether it cannot be a hub id."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def resolve(path: str, format: ModelFormat = PIPELINE, key: str = "model.path") -> str:
    """A local folder, a shipped model's folder, or a hub id as it stands. key: the one of the recipe that names it."""
    if (place := find_local(path)) is not None:
        return str(place)
    if is_local_path(path):
        shipped = sorted(p.parent.name for p in ASSETS.glob(f"*/{format.marker}"))
        also = f", or a shipped model ({', '.join(shipped)})" if shipped else ""
        raise ModelError(
            f"{key}: no folder {path!r}; expected {format.folder}, a hub id such as {format.example}{also}"
        )
    return path


def check_source(path: str) -> None:
    """Raise ModelError unless a path may be the folder of a run or of a model, a shipped model, or a hub id."""
    if find_local(path) is None and is_local_path(path):
        formats = (PIPELINE, LANGUAGE_MODEL)
        shipped = sorted({place.parent.name for format in formats for place in ASSETS.glob(f"*/{format.marker}")})
        raise ModelError(
            f"no folder {path!r}; expected the folder of a run or of a model, a hub id such as {PIPELINE.example}, or a "
            f"shipped model ({', '.join(shipped)})"
        )


def check_run_folder(run: Path) -> None:
    """Raise ModelError unless a folder is that of a run."""
    if not (run / "config.yaml").is_file():
        raise ModelError(
            f"{run} is not a run folder: config.yaml not found in it; give a folder that `difrl train` made"
        )
