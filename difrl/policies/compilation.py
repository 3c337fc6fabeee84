"""torch.compile of a model's repeated blocks (`model.compile`)."""

from __future__ import annotations

import torch
from torch import nn

from difrl.policies.errors import ModelError
from difrl.policies.layout import find_blocks

VARIANTS = 64
"""Most compiled forms of a block: with and without gradient, with and without adapter, by kind of block, shape and cache."""


def compile_blocks(network: nn.Module, device: torch.device | str) -> None:
    """Compile the repeated blocks of a network in place, or all of it if it has none.

    Their first calls compile them. The names of parameters stay. Raise ModelError without a compiler.
    """
    if torch.device(device).type == "cpu":
        _require_compiler()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for block in find_blocks(network) or [network]:
        block.compile()


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ModelError(
            "model.compile: on a CPU it needs a C++ compiler, and none was found; install g++, or set model.compile: false"
        ) from error
