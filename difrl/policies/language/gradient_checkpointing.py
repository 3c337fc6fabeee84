"""Activations that are computed again in the backward pass, layer by layer.

transformers' own switch works in training mode alone, which brings dropout, and drops the cache of what is generated. Here a
layer is recomputed wherever gradients are on: in evaluation mode too, whether or not its input needs a gradient (with LoRA
the first one's does not).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from difrl.policies.errors import ModelError


def recompute_layers(model: nn.Module) -> None:
    """From now on the layers that transformers marks for it keep their input alone."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"model.gradient_checkpointing: {type(model).__name__} names no layers that can be recomputed; set false"
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
