"""The optimizers of `train.optimizer`: torch's own, and those that store their moments in fewer bits or page them out.

All decay weights as AdamW does (arXiv:1711.05101): w ← w − lr · weight_decay · w, beside the step along the gradient. torchao and
bitsandbytes keep moments of parameters with fewer than 4,096 elements in float32.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from difrl.config import TrainConfig
from difrl.runtime.errors import UserError


class OptimizerError(UserError):
    """An optimizer that cannot run here."""


class Source(NamedTuple):
    """The class of an optimizer, and the library that has it."""

    library: str
    name: str


OPTIMIZERS: Mapping[str, Source] = {
    "adamw": Source("torch", "AdamW"),
    "adamw8bit": Source("torchao", "AdamW8bit"),
    "adamw4bit": Source("torchao", "AdamW4bit"),
    "adamw_fp8": Source("torchao", "AdamWFp8"),
    "paged_adamw": Source("bitsandbytes", "PagedAdamW"),
    "paged_adamw8bit": Source("bitsandbytes", "PagedAdamW8bit"),
    "lion": Source("bitsandbytes", "Lion"),
    "lion8bit": Source("bitsandbytes", "Lion8bit"),
    "paged_lion8bit": Source("bitsandbytes", "PagedLion8bit"),
}
"""`train.optimizer` -> its source. A library is imported only where it is chosen."""


def build_optimizer(parameters: Sequence[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer of a run. Every step sets its learning rate. Raise OptimizerError without its library."""
    source = OPTIMIZERS[train.optimizer]
    try:
        cls: Any = getattr(importlib.import_module(f"{source.library}.optim"), source.name)
    except (ImportError, OSError) as error:  # a library for CUDA may not load here
        raise OptimizerError(
            f"train.optimizer: {train.optimizer} needs {source.library}, which cannot be imported ({error}); install it "
            f"(pip install {source.library}), or set train.optimizer: adamw"
        ) from error
    optimizer: Any = cls(parameters, lr=1.0, betas=train.betas, weight_decay=train.weight_decay)
    if source.library == "torchao" and not any(p.is_cuda for p in parameters):
        # torchao compiles its step for every shape, which on a CPU takes a C++ compiler and longer than it saves.
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
    built: torch.optim.Optimizer = optimizer
    return built


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all parameters. That of torchao's optimizers is a tensor, which their compiled step reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def count_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimizer's state on the device of its parameters. Counters and shared tables are negligible."""
    tensors = [
        value
        for p, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, Tensor) and value.device == p.device and value.ndim
    ]
    return sum(part.nbytes for part in {id(part): part for one in tensors for part in _parts(one)}.values())


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that hold the data of a tensor. A quantised one consists of several."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]
