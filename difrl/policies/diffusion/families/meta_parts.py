"""The parts of a diffusers pipeline without their weights: modules on the meta device, built from their config.json."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
import transformers
from diffusers import ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from difrl.policies.errors import ModelError
from difrl.policies.weight_files import check_weights

IMAGES = ("pixel_values", "image_grid_thw", "image_sizes", "mm_token_type_ids")
"""Arguments of text encoders of transformers that hold images, their sizes, and the tokens that stand for them."""


def build_meta_parts(
    path: str, revision: str | None, index: Mapping[str, Any], left_out: Collection[str]
) -> dict[str, Any]:
    """Build the parts that model_index.json (`index`) lists, but for those left out.

    Modules are on the meta device. They take any tensors, and return zeros, without gradient on the CPU, of the right shapes.
    Schedulers and tokenizers are complete.
    """
    # Other lists of the index are settings of the pipeline.
    parts = {
        name: part
        for name, part in index.items()
        if isinstance(part, list | tuple) and len(part) == 2 and isinstance(part[0], str) and name not in left_out
    }
    built = {name: _build_part(path, name, library, cls, revision) for name, (library, cls) in parts.items()}
    check_parts(path, built)
    return built


def _build_part(path: str, name: str, library: str | None, class_name: str | None, revision: str | None) -> Any:
    if library is None or class_name is None:
        return None
    cls = getattr(importlib.import_module(library), class_name, None)
    if cls is None:
        return None
    folder, local = Path(path) / name, Path(path).is_dir()
    if not issubclass(cls, nn.Module):
        if local and not (folder.is_dir() and any(folder.iterdir())):
            raise ModelError(
                f"model.path: {folder} has no files, expected a {class_name}; copy or download the model again"
            )
        return cls.from_pretrained(path, subfolder=name, revision=revision)
    if issubclass(cls, ModelMixin):
        config = cls.load_config(path, subfolder=name, revision=revision)
        with torch.device("meta"):
            return _accept_any_device(cls.from_config(config))
    return _accept_any_device(_build_encoder(cls, path, name, revision))


def build_meta_encoders(path: str, revision: str | None, index: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Build the parts of model_index.json (`index`) that are models of transformers, on the meta device.

    These encode prompts, and nothing else. A call of one raises an error.
    """
    parts = {name: part for name, part in index.items() if isinstance(part, list | tuple) and len(part) == 2}
    classes = {
        name: getattr(transformers, str(cls), None) for name, (lib, cls) in parts.items() if lib == "transformers"
    }
    return {
        name: _build_encoder(cls, path, name, revision)
        for name, cls in classes.items()
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel)
    }


def _build_encoder(cls: Any, path: str, name: str, revision: str | None) -> nn.Module:
    config = cls.config_class.from_pretrained(path, subfolder=name, revision=revision)
    with torch.device("meta"):
        module: nn.Module = cls(config)
    return module


def check_parts(path: str, parts: Mapping[str, Any]) -> None:
    """Raise ModelError unless a local folder holds whole weights for the parts of a pipeline. The hub's are not checked."""
    if not Path(path).is_dir():
        return
    for name, part in parts.items():
        if isinstance(part, nn.Module) and (Path(path) / name).is_dir():  # others come from elsewhere
            file = "diffusion_pytorch_model.safetensors" if isinstance(part, ModelMixin) else "model.safetensors"
            check_weights(Path(path) / name, [file], part, "model.path")


def _accept_any_device(module: nn.Module) -> nn.Module:
    """Let a module on the meta device be called as one with weights is. A deep copy of it can be called so too."""
    for name in ("forward", "encode", "decode"):
        method = getattr(type(module), name, None)
        if method is not None:
            setattr(module, name, MethodType(_convert_tensors(method), module))
    return module


def _convert_tensors(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @wraps(method)  # some blocks read its signature
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def convert(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to("meta", next(self.parameters()).dtype if value.is_floating_point() else None)

        bound = signature.bind(self, *args, **kwargs)
        if isinstance(self, PreTrainedModel) and "attention_mask" in bound.arguments:
            # transformers uses a mask of four dimensions as it is. Of any other it reads values, and meta tensors have none.
            batch, length = bound.arguments["input_ids"].shape
            bound.arguments["attention_mask"] = torch.ones(batch, 1, length, length, dtype=torch.bool)
        if "input_ids" in bound.arguments:
            # Tokens stand for the images already, so the shapes are those without them. Vision encoders read sizes of images.
            for name in IMAGES:
                bound.arguments.pop(name, None)
        with patch.object(torch, "autocast", _no_autocast):  # which torch has not for the meta device
            result = method(self, *tree_map(convert, bound.args[1:]), **tree_map(convert, bound.kwargs))
        return tree_map(_to_zeros, result)

    return call


@contextmanager
def _no_autocast(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _to_zeros(value: Any) -> Any:
    if isinstance(value, DiagonalGaussianDistribution):
        return DiagonalGaussianDistribution(_to_zeros(value.parameters))
    if not isinstance(value, Tensor) or value.requires_grad:
        return value
    return torch.zeros((), dtype=value.dtype).expand(value.shape)
