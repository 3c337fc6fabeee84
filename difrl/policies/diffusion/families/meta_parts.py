"""The parts of a diffusers pipeline without their weights: modules on the meta device, built from config.json alone."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import nn

from difrl.policies.errors import ModelError
from difrl.policies.weight_files import check_weights


def build_meta_parts(
    path: str, revision: str | None, index: Mapping[str, Any], left_out: Collection[str]
) -> dict[str, Any]:
    """Build the parts that model_index.json (`index`) lists, but for those left out.

    Modules are on the meta device, the scheduler is complete, and everything else (tokenizers) is None.
    """
    parts = {name: part for name, part in index.items() if isinstance(part, list | tuple) and name not in left_out}
    built = {name: _build_part(path, name, library, cls, revision) for name, (library, cls) in parts.items()}
    check_parts(path, built)
    return built


def _build_part(path: str, name: str, library: str | None, class_name: str | None, revision: str | None) -> Any:
    if library is None or class_name is None:
        return None
    cls = getattr(importlib.import_module(library), class_name, None)
    if cls is not None and issubclass(cls, SchedulerMixin):
        return cls.from_pretrained(path, subfolder=name, revision=revision)
    folder = Path(path) / name
    if cls is None or not issubclass(cls, nn.Module):
        if Path(path).is_dir() and not (folder.is_dir() and any(folder.iterdir())):
            raise ModelError(
                f"model.path: {folder} has no files, expected a {class_name}; copy or download the model again"
            )
        return None
    if issubclass(cls, ModelMixin):
        config = cls.load_config(path, subfolder=name, revision=revision)
        with torch.device("meta"):
            return cls.from_config(config)
    config = cls.config_class.from_pretrained(path, subfolder=name, revision=revision)
    with torch.device("meta"):
        return cls(config)


def check_parts(path: str, parts: Mapping[str, Any]) -> None:
    """Raise ModelError unless a local folder holds whole weights for the parts of a pipeline. The hub's are not checked."""
    if not Path(path).is_dir():
        return
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            file = "diffusion_pytorch_model.safetensors" if isinstance(part, ModelMixin) else "model.safetensors"
            check_weights(Path(path) / name, [file], part, "model.path")
