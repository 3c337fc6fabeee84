"""A network with quantised weights that draws the samples of training (`rollout.precision`), by torchao.

For the time of a `with` block, the linear layers have quantised copies of their weights. Adapters stay themselves, so no weights
are sent from training to sampling. The copies are made anew in every block, which reads the weights once; a rollout reads them
once a denoising step or token. So a network that is trained as a whole needs nothing special, and memory is free again
during the update.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from difrl.policies.errors import ModelError
from difrl.runtime.quiet_libraries import silenced_libraries

SETTINGS: Mapping[str, str] = {
    "int8": "Int8WeightOnlyConfig",
    "int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
    "float8": "Float8WeightOnlyConfig",
    "float8_dynamic": "Float8DynamicActivationFloat8WeightConfig",
}
"""rollout.precision -> torchao's configuration."""


@contextmanager
def quantized(module: nn.Module, precision: str, dtype: torch.dtype) -> Iterator[None]:
    """Give the linear layers of a module quantised weights inside the block, for passes in `dtype` without gradient."""
    layers = [] if precision == "same" else quantizable(module)
    own = [layer.weight for layer in layers]
    copies = _quantize(own, precision, dtype) if layers else []

    def cast(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0].to(dtype), *inputs[1:]  # autocast does not do it for torchao's tensors

    try:
        with ExitStack() as stack:
            for layer, copy in zip(layers, copies, strict=True):
                layer.weight = copy
                stack.enter_context(layer.register_forward_pre_hook(cast))
            yield
    finally:
        for layer, weight in zip(layers, own, strict=True):
            layer.weight = weight


def quantizable(module: nn.Module) -> list[nn.Linear]:
    """Return the linear layers that are quantised: all but those of adapters and the output layer of a language model."""
    output = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    return [
        part
        for name, part in module.named_modules()
        if type(part) is nn.Linear and ".lora_" not in name and part is not output
    ]


def check_precision(module: nn.Module, precision: str, dtype: torch.dtype) -> None:
    """Raise ModelError if the module has no layers to quantise, or this machine cannot quantise them."""
    if precision == "same":
        return
    layers = quantizable(module)
    if not layers:
        raise ModelError(
            f"rollout.precision: {type(module).__name__} has no linear layers to quantise; set rollout.precision: same"
        )
    if not layers[0].weight.is_meta:
        _quantize([layers[0].weight], precision, dtype)


def _quantize(weights: Sequence[Tensor], precision: str, dtype: torch.dtype) -> list[nn.Parameter]:
    try:
        with silenced_libraries():
            quantization: Any = importlib.import_module("torchao.quantization")
        # One scale a row of activations: with one for all of them, a sample would depend on its batch.
        options = {"granularity": quantization.PerRow()} if precision == "float8_dynamic" else {}
        setting, copies = getattr(quantization, SETTINGS[precision])(**options), list[nn.Parameter]()
        for weight in weights:  # one after the other, as training may hold them in another type
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
            quantization.quantize_(nn.ModuleList([layer]), setting)
            copies.append(nn.Parameter(layer.weight, requires_grad=False))
        return copies
    except (ImportError, AssertionError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"rollout.precision: {precision} cannot run here ({type(error).__name__}: {error}); it needs torchao "
            "(pip install torchao), and float8_dynamic a GPU of compute capability 8.9. Set int8, which runs everywhere, or same"
        ) from error
