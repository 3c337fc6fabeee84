"""The cost of one evaluation of a model, counted on the meta device: nothing is computed and no memory is used.

Matrix products and convolutions are counted as they are called. So the count is right also for models that do not send
every token through every weight (an MMDiT has one set for image tokens and one for text tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """The cost of one evaluation of one sample."""

    forward: int
    """FLOPs without gradient."""
    training: int
    """FLOPs with gradient: forward, backward, and the second forward if activations are recomputed."""
    activations: int
    """Bytes that are stored between forward and backward."""


def count_call_cost(module: nn.Module, call: Callable[[], Tensor], recompute: Callable[[Any], Any] | None) -> Cost:
    """Count the cost of a call on the meta device. `recompute` enables gradient checkpointing with the given function."""
    with torch.no_grad(), _FusedAttention(), _Flops() as forward:
        call()
    kept = _Kept.beside(module)
    if recompute is not None:
        recompute(kept.block)
    with _FusedAttention(), _Flops() as both:
        with kept.watching():
            output = call()
        output.sum().backward()
    again = 0 if recompute is None else forward.total
    return Cost(forward.total, both.total + again, kept.bytes + kept.largest_block)


class _Flops(TorchDispatchMode):
    """Counter of FLOPs by torch's own formulas. torch's FlopCounterMode separates modules, which takes seconds."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


@dataclass
class _Kept:
    """The storages that autograd keeps. Each counts once, and weights do not count."""

    seen: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    """Storages by address. They are kept alive, so that no address is used again."""
    bytes: int = 0
    largest_block: int = 0
    """Bytes of the largest recomputed block; one block is alive at a time."""

    @classmethod
    def beside(cls, module: nn.Module) -> _Kept:
        storages = [p.untyped_storage() for p in [*module.parameters(), *module.buffers()]]
        return cls({s._cdata: s for s in storages})

    def watching(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage
            self.bytes += storage.nbytes()
        return tensor

    def block(self, module: Callable[..., Any], *args: Any) -> Any:
        """Run a block in the place of torch's checkpoint, which keeps only its inputs."""
        for arg in args:
            if isinstance(arg, Tensor):
                self._keep(arg)
        inside = _Kept(dict(self.seen))
        with inside.watching():
            result = module(*args)
        self.largest_block = max(self.largest_block, inside.bytes)
        return result


class _FusedAttention(TorchFunctionMode):
    """Attention as in fused kernels. torch's own attention on the meta device would store the attention matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    repeated = query.shape[-3] // key.shape[-3]  # grouped queries share keys and values
    key, value = (x.repeat_interleave(repeated, dim=-3) for x in (key, value))
    attended: Tensor = _Attention.apply(query, key, value)
    return attended


class _Attention(torch.autograd.Function):
    """Attention with the shapes and products of fused kernels. The backward pass has five products: it recomputes the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = (query @ key.mT) @ value
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _ = ctx.saved_tensors
        scores, inner = query @ key.mT, gradient @ value.mT
        return inner @ key, inner.mT @ query, scores.mT @ gradient


def measure_matmul_speed(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Measure FLOP/s of a square matrix product that is large for the device: the best of some tenths of a second."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, dtype=dtype, device=device)
    timer = Timer(
        "float((a @ a)[0, 0])", globals={"a": a}, num_threads=threads
    )  # reading a number waits for the device
    return 2 * size**3 / min(timer.blocked_autorange(min_run_time=0.2).times)
