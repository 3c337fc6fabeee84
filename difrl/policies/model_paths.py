"""Resolution of `model.path`: a local folder, a shipped model, or a hub id."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from difrl.policies.errors import ModelError
from difrl.runtime.paths import PACKAGE, expand_user
from rewards.sources import explain_missing

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


MODULAR_INDEX = "modular_model_index.json"
"""The file that identifies a folder of diffusers' modular format, which some pipelines have instead."""
PIPELINE = ModelFormat("a diffusers folder", "model_index.json", "stabilityai/stable-diffusion-3.5-medium")


LANGUAGE_MODEL = ModelFormat("a transformers folder", "tokenizer_config.json", "Qwen/Qwen3-0.6B")


def find_local(path: str) -> Path | None:
    """A local folder, or that of a shipped model."""
    return next((place for place in (expand_user(path), ASSETS / path) if os.path.isdir(place)), None)


def list_shipped(*formats: ModelFormat) -> list[str]:
    """Return the names of the shipped models of these formats."""
    return sorted({place.parent.name for format in formats for place in ASSETS.glob(f"*/{format.marker}")})


def resolve(path: str, format: ModelFormat = PIPELINE, key: str = "model.path") -> str:
    """A local folder, a shipped model's folder, or a hub id as it stands. key: the one of the recipe that names it."""
    if (place := find_local(path)) is not None:
        return str(place)
    shipped = list_shipped(format)
    if problem := explain_missing(path, shipped):
        also = f", or a shipped model ({', '.join(shipped)})" if shipped else ""
        raise ModelError(f"{key}: {problem}; expected {format.folder}, a hub id such as {format.example}{also}")
    return path


def check_source(path: str) -> None:
    """Raise ModelError unless a path may be the folder of a run or of a model, a shipped model, or a hub id."""
    shipped = list_shipped(PIPELINE, LANGUAGE_MODEL)
    if find_local(path) is None and (problem := explain_missing(path, shipped)):
        raise ModelError(
            f"{problem}; expected the folder of a run or of a model, a hub id such as {PIPELINE.example}, or a shipped "
            f"model ({', '.join(shipped)})"
        )


def check_run_folder(run: Path) -> None:
    """Raise ModelError unless a folder is that of a run."""
    if not (run / "config.yaml").is_file():
        raise ModelError(
            f"{run} is not a run folder: config.yaml not found in it; give a folder that `difrl train` made"
        )
