"""A LoRA whose scale is in its weights, so that every reader applies it at the strength of training.

PEFT adds (alpha / rank) B A to a weight. The result here is the same adapter with B' = (alpha / rank) B and alpha' = rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

_SCALED = (".lora_B", ".lora_embedding_B")
"""Parts of an adapter that its scale multiplies: weights and biases of B."""


@torch.no_grad()
def get_unscaled_lora(module: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Return the adapter's tensors by PEFT's names, float32 on the CPU."""
    scales = {name: part.scaling[adapter] for name, part in module.named_modules() if isinstance(part, LoraLayer)}

    def convert(name: str, value: Tensor) -> Tensor:
        layer = next((name.partition(part)[0] for part in _SCALED if part in name), None)
        tensor = value.detach().float().cpu()
        return (tensor if layer is None else tensor * scales[layer]).contiguous()

    return {
        name: convert(name, value) for name, value in get_peft_model_state_dict(module, adapter_name=adapter).items()
    }


def describe_unscaled_lora(module: Any, adapter: str = "default") -> dict[str, Any]:
    """Return the adapter's settings for the header of its file."""
    settings: dict[str, Any] = module.peft_config[adapter].to_dict()
    scale = {"lora_alpha": settings["r"], "alpha_pattern": settings["rank_pattern"], "use_rslora": False}
    return settings | scale


def sort_header(file: Path) -> None:
    """Sort the entries of a safetensors header in place. It is written in an order that differs from process to process."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"{file}: the header has {size} bytes and takes {len(text)} when it is sorted")
        stream.seek(8)
        stream.write(text.ljust(size))
