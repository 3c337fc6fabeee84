"""The parts of a diffusers pipeline without their weights: modules on the meta device, built from config.json alone."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import nn

_WEIGHTS = ("*.safetensors", "*.bin")


def build_meta_parts(
    path: str, revision: str | None, index: Mapping[str, Any], left_out: Collection[str]
) -> dict[str, Any]:
    """Build the parts that model_index.json (`index`) lists, but for those left out.

    Modules are on the meta device, the scheduler is complete, and everything else (tokenizers) is None.
    """
    parts = {name: part for name, part in index.items() if isinstance(part, list | tuple) and name not in left_out}
    return {name: _build_part(path, name, library, cls, revision) for name, (library, cls) in parts.items()}


def _build_part(path: str, name: str, library: str | None, class_name: str | None, revision: str | None) -> Any:
    if library is None or class_name is None:
        return None
    cls = getattr(importlib.import_module(library), class_name, None)
    if cls is not None and issubclass(cls, SchedulerMixin):
        return cls.from_pretrained(path, subfolder=name, revision=revision)
    if cls is None or not issubclass(cls, nn.Module):
        return None
    _check_weights(Path(path), name)
    if issubclass(cls, ModelMixin):
        config = cls.load_config(path, subfolder=name, revision=revision)
        with torch.device("meta"):
            return cls.from_config(config)
    config = cls.config_class.from_pretrained(path, subfolder=name, revision=revision)
    with torch.device("meta"):
        return cls(config)


def _check_weights(folder: Path, name: str) -> None:
    """Raise FileNotFoundError if a part of a local folder lacks weights. Files of the hub are checked when they are loaded."""
    part = folder / name
    if folder.is_dir() and not any(file for pattern in _WEIGHTS for file in part.glob(pattern)):
        raise FileNotFoundError(
            f"{part} holds no weights, expected a *.safetensors file; copy or download the model again"
        )
