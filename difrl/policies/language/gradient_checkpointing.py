"""Gradient checkpointing of language models: activations are recomputed in the backward pass, layer by layer.

The switch of transformers works in training mode only, which activates dropout, and it disables the cache of generation.
Here a layer is recomputed whenever gradients are enabled: in evaluation mode too, and also if its input needs no gradient
(with LoRA that of the first layer needs none).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.utils.checkpoint
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from difrl.policies.errors import ModelError


def recompute_layers(model: nn.Module) -> None:
    """Let every layer that transformers marks as checkpointable keep only its input for the backward pass."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"model.gradient_checkpointing: {type(model).__name__} marks no layers that can be recomputed; set it to false"
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)
