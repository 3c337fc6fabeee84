"""Weights of a model with LoRA as those of a plain model: adapters are merged, and names are those of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

BASE_LAYER = "base_layer"


@torch.no_grad()
def plain_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) as in a checkpoint without adapters; tied weights come once.

    For a layer with an enabled adapter the tensor is new: W + ΔW in the adapter's precision. All other tensors are the
    model's own. They come one at a time, since a large model fits into memory only once.
    """
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, parameter in model.named_parameters():
        place, _, leaf = name.rpartition(".")
        owner = place.removesuffix(f".{BASE_LAYER}")
        if place != owner and owner in adapted:
            yield f"{owner}.{leaf}", _merged(adapted[owner], leaf, parameter.detach())
        elif not any(name.startswith(f"{layer}.") for layer in adapted):
            yield name, parameter.detach()


def compute_fingerprint(model: nn.Module) -> Tensor:
    """Return numbers [·] that change with the plain weights: the sum of each parameter, and the state of each adapter."""
    sums = torch.stack([parameter.detach().sum(dtype=torch.float64) for parameter in model.parameters()])
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    return torch.cat([sums, sums.new_tensor([float(layer.disable_adapters) for layer in layers])])


def _merged(layer: BaseTunerLayer, leaf: str, tensor: Tensor) -> Tensor:
    if leaf != "weight" or layer.disable_adapters:
        return tensor
    deltas = [layer.get_delta_weight(name) for name in layer.active_adapters]
    return sum(deltas, tensor.to(deltas[0].dtype)) if deltas else tensor
