"""Frozen weights of a denoiser in CPU memory, copied to the device layer by layer (`model.offload: weights`).

diffusers' group offload moves them in and out around the forward pass of each layer, on a GPU in a stream of its own. It is
made for sampling: the backward pass finds the weights that it needs moved out. So each layer computes with views of its weights
here. Where autograd saves one, it keeps a reference, and copies the weight to the device again. Where a recomputed block
saves one (`model.gradient_checkpointing`), the view keeps the copy on the device until the block's backward pass is over.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop


class _Weight(NamedTuple):
    """A view of a frozen parameter that a backward pass reads."""

    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """Number of elements between the first of the parameter and that of the view."""


def offload_weights(denoiser: Any, device: torch.device | str) -> None:
    """Keep the weights of a denoiser of diffusers, which are all frozen, in CPU memory.

    Adapters that are added later have layers of their own, which stay on the device.
    """
    device = torch.device(device)
    for layer in denoiser.modules():
        if layer._parameters:
            layer.forward = partial(_compute_with_views, layer, layer.forward)
    denoiser.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
    denoiser.forward = partial(_keep_references, denoiser.forward, device)


def copy_to(device: torch.device, parameter: nn.Parameter) -> Tensor:
    """Return the values of a weight on a device."""
    return parameter.detach().to(device)


def _compute_with_views(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    own = dict(layer._parameters)
    views = {name: p if p is None or p.requires_grad else p.view_as(p) for name, p in own.items()}
    layer._parameters.update(cast(dict[str, nn.Parameter | None], views))
    try:
        return forward(*args, **kwargs)
    finally:
        layer._parameters.update(own)


def _keep_references(forward: Callable[..., Any], device: torch.device, *args: Any, **kwargs: Any) -> Any:
    hooks = torch.autograd.graph.saved_tensors_hooks(_pack, partial(_unpack, device))
    with hooks, set_checkpoint_early_stop(False):  # the last layer of a recomputed block would not be moved out
        return forward(*args, **kwargs)


def _pack(tensor: Tensor) -> Tensor | _Weight:
    owner: Any = tensor._base  # the types of torch do not have it
    if not isinstance(owner, nn.Parameter) or owner.requires_grad:
        return tensor
    return _Weight(owner, tensor.size(), tensor.stride(), int(tensor.storage_offset() - owner.storage_offset()))


def _unpack(device: torch.device, packed: Tensor | _Weight) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    own = copy_to(device, packed.parameter)
    return own.as_strided(packed.size, packed.stride, int(own.storage_offset()) + packed.offset)
