"""Which weights are trained, and how the pretrained ones are come back to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from difrl.config import ModelConfig
from difrl.policies.errors import ModelError
from difrl.policies.snapshots import Copy

ADAPTER = "default"


def trained_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take a gradient, by name, made float32."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data = p.data.float()
    return trained


def base_weights(
    module: nn.Module, model: ModelConfig, trained: Mapping[str, nn.Parameter], keep: bool
) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the model is the pretrained one: LoRA switched off, or a kept copy exchanged in."""
    if model.train == "lora":

        @contextmanager
        def without_adapter() -> Iterator[None]:
            module.disable_adapters()  # type: ignore[operator]
            try:
                yield
            finally:
                module.enable_adapters()  # type: ignore[operator]

        return without_adapter
    frozen = Copy(trained, copies_of(model)) if keep else None

    @contextmanager
    def copied() -> Iterator[None]:
        if frozen is None:
            raise ModelError("the pretrained weights were not kept; load the policy with keep_base=True")
        with frozen.placed():
            yield

    return copied


def copies_of(model: ModelConfig) -> str | None:
    """Where copies of the weights stay; None: beside them."""
    return "cpu" if model.copies == "cpu" else None
