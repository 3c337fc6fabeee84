"""Frozen weights in fewer bits (`model.quantize`), by the configurations of diffusers and transformers.

torchao stores a linear layer as int8 or float8 with a scale for each row, bitsandbytes as nf4 (arXiv:2305.14314) with a scale for
64 weights. Both compute with them in `model.dtype`. Only linear layers are quantised, without the head of a language model
and the layers that a library keeps in float32.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from difrl.config import ModelConfig
from difrl.policies.errors import ModelError
from difrl.runtime.dtypes import DTYPES

DENOISERS = ("transformer", "unet")
"""First words of the names of denoisers in pipelines of diffusers."""


class Format(NamedTuple):
    """Storage of a quantised weight."""

    library: str
    kind: str | None
    """Name of torchao's configuration."""
    bytes: float
    """Bytes of a weight, without scales."""
    row_bytes: int = 0
    """Bytes of the scale of a row, and of its zero point."""
    block: int = 0
    """Number of weights that share a float32 scale."""


FORMATS: Mapping[str, Format] = {
    "int8": Format("torchao", "Int8WeightOnlyConfig", 1, row_bytes=5),
    "float8": Format("torchao", "Float8WeightOnlyConfig", 1, row_bytes=4),
    "nf4": Format("bitsandbytes", None, 0.5, block=64),
}
"""`model.quantize` -> its format."""


def build_quantization(model: ModelConfig, library: str) -> Any:
    """Return the configuration of `model.quantize` for `library`, diffusers or transformers.

    Raise ModelError if the format cannot be used here.
    """
    format = FORMATS[model.quantize]
    try:
        own = importlib.import_module("torchao.quantization" if format.kind else format.library)
    except (ImportError, OSError) as error:  # a library for CUDA may not load here
        raise ModelError(
            f"model.quantize: {model.quantize} needs {format.library}, which cannot be imported ({error}); install it "
            f"(pip install {format.library}), or set model.quantize: none"
        ) from error
    configurations = importlib.import_module(library)
    if format.kind is not None:
        return configurations.TorchAoConfig(getattr(own, format.kind)())
    if not torch.accelerator.is_available():
        raise ModelError(
            f"model.quantize: {model.quantize} needs a GPU, and found none; set model.quantize: int8 or float8, which run "
            "everywhere"
        )
    return configurations.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[model.dtype]
    )


def plan_pipeline(index: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Return the configuration of each denoiser of a pipeline, by name; {} without `model.quantize`.

    index: its model_index.json.
    """
    if model.quantize == "none":
        return {}
    parts = [name for name, part in index.items() if isinstance(part, list | tuple) and part[0] is not None]
    return {name: build_quantization(model, "diffusers") for name in parts if name.startswith(DENOISERS)}


def is_quantized(module: nn.Module) -> bool:
    """Return whether a model of diffusers or transformers has quantised weights."""
    return bool(getattr(module, "is_quantized", False))


def is_composed(tensor: Tensor) -> bool:
    """Return whether a weight is quantised by torchao. Such a tensor consists of several."""
    return type(tensor).__module__.startswith("torchao.")


def count_frozen_bytes(module: nn.Module, quantize: str = "none") -> dict[str, int]:
    """Return the bytes of the floating-point weights of a module that are not trained, by format, once they are quantised.

    The module has its weights in their usual types, or is on the meta device.
    """
    layers = {} if quantize == "none" else _find_layers(module)
    found: dict[str, int] = defaultdict(int)
    for p in [*module.parameters(), *module.buffers()]:
        if p.requires_grad or not p.is_floating_point():
            continue
        if id(p) in layers:
            format, rows = FORMATS[quantize], p.shape[0]
            scales = 4 * -(-p.numel() // format.block) if format.block else rows * format.row_bytes
            found[quantize] += int(p.numel() * format.bytes) + scales
        else:
            found[str(p.dtype).removeprefix("torch.")] += p.nbytes
    return dict(found)


def _find_layers(module: nn.Module) -> set[int]:
    """Return the ids of the weights that the libraries quantise."""
    kept = list(getattr(module, "_keep_in_fp32_modules", None) or [])
    if isinstance(module, PreTrainedModel):
        kept = HfQuantizer.get_modules_to_not_convert(module, None, kept)
        chosen = [part for name, part in module.named_modules() if should_convert_module(f"{name}.weight", kept)]
    else:
        chosen = [
            part for name, part in module.named_modules() if not any(f"{key}." in f"{name}.weight" for key in kept)
        ]
    return {id(part.weight) for part in chosen if isinstance(part, nn.Linear)}
