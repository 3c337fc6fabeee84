"""Adapters of LoRA merged into the weights of their module."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer


@torch.no_grad()
def merge_adapters(module: Any) -> None:
    """Replace every adapted layer of a model of diffusers or transformers by its own, with W + ΔW in the precision of W."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            module.set_submodule(name, layer.get_base_layer())
    if getattr(module, "peft_config", None):
        del module.peft_config
        module._hf_peft_config_loaded = False
