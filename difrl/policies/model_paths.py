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
