"""The parts of a diffusers pipeline without their weights: modules on the meta device, from their config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_WEIGHTS = ("*.safetensors", "*.bin")


def skeleton_parts(path: str, revision: str | None) -> dict[str, Any]:
    """What model_index.json names: modules on the meta device, the scheduler as it is, None for all else."""
    index = DiffusionPipeline.load_config(path, revision=revision)
    entries = {name: tuple(entry) for name, entry in index.items() if isinstance(entry, list | tuple)}
    return {name: _part(path, name, library, cls, revision) for name, (library, cls) in entries.items()}


def _part(path: str, name: str, library: str | None, class_name: str | None, revision: str | None) -> Any:
    cls = getattr(_LIBRARIES.get(library or ""), class_name or "", None)
    if cls is not None and issubclass(cls, SchedulerMixin):
        return cls.from_pretrained(path, subfolder=name, revision=revision)
    if cls is None or not issubclass(cls, nn.Module):
        return None
    _check_weights(Path(path), name)
    if library == "diffusers":
        config = cls.load_config(path, subfolder=name, revision=revision)
        with torch.device("meta"):
            return cls.from_config(config)
    config = cls.config_class.from_pretrained(path, subfolder=name, revision=revision)
    with torch.device("meta"):
        return cls(config)


def _check_weights(folder: Path, name: str) -> None:
    """That a local folder is complete; a hub's files are looked at when they are loaded."""
    part = folder / name
    if folder.is_dir() and not any(file for pattern in _WEIGHTS for file in part.glob(pattern)):
        raise FileNotFoundError(
            f"{part} holds no weights, expected a *.safetensors file; copy or download the model again"
        )
