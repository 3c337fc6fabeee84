"""The cost of one evaluation of a model, counted on the meta device: nothing is computed and no memory is used.

Matrix products and convolutions are counted as they are called. So the count is right also for models that do not send
every token through every weight (an MMDiT has one set for image tokens and one for text tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """The cost of one evaluation of one sample."""

    forward: int
    """FLOPs without gradient."""
    training: int
    """FLOPs with gradient: forward, backward, and the second forward if activations are recomputed."""
    activations: int
    """Bytes that are stored between forward and backward."""


def count_call_cost(module: nn.Module, call: Callable[[], Tensor]) -> Cost:
    """Count the cost of a call of a module on the meta device, which may recompute activations by torch's checkpoint."""
    kept = KeptStorages(p.untyped_storage() for p in [*module.parameters(), *module.buffers()])
    checkpoint = patch.object(torch.utils.checkpoint, "checkpoint", kept.run_block)
    with checkpoint, _FusedAttention(), FlopCounterMode(display=False) as counter:
        with kept:
            output = call()
        forward = counter.get_total_flops()
        output.sum().backward()
    again = forward if kept.largest_block else 0
    return Cost(forward, counter.get_total_flops() + again, kept.bytes + kept.largest_block)


class KeptStorages(saved_tensors_hooks):
    """The storages that autograd keeps inside a `with` block, beside known ones such as weights. Each counts once."""

    def __init__(self, known: Iterable[UntypedStorage]) -> None:
        super().__init__(self.keep, lambda tensor: tensor)
        # By address. They are kept alive, so that no address is used again.
        self.seen = {storage._cdata: storage for storage in known}
        self.bytes = 0
        self.largest_block = 0
        """Bytes of the largest recomputed block; one block is alive at a time."""

    def keep(self, tensor: Tensor) -> Tensor:
        """Count the storage of a tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage
            self.bytes += storage.nbytes()
        return tensor

    def run_block(self, block: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
        """Run a block in the place of torch's checkpoint, which keeps only its inputs."""
        for arg in args:
            if isinstance(arg, Tensor):
                self.keep(arg)
        inside = KeptStorages(self.seen.values())
        with inside:
            result = block(*args, **kwargs)
        self.largest_block = max(self.largest_block, inside.bytes)
        return result


class _FusedAttention(TorchFunctionMode):
    """Attention by a fused kernel. torch itself takes none on the meta device, and stores the attention matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_attend if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    repeated = query.shape[-3] // key.shape[-3]  # grouped queries share keys and values
    key, value = (x.repeat_interleave(repeated, dim=-3) for x in (key, value))
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    if q.shape[-1] == v.shape[-1]:
        attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    else:
        attended = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
    return attended.reshape(*query.shape[:-1], value.shape[-1])


def measure_matmul_speed(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Measure FLOP/s of a square matrix product that is large for the device: the best of some tenths of a second."""
    size = 1024 if device.type == "cpu" else 8192
    values = {"a": torch.ones(size, size, dtype=dtype, device=device)}
    # Reading a number waits for the device.
    timer = Timer("float((a @ a)[0, 0])", globals=values, num_threads=threads)
    return 2 * size**3 / min(timer.blocked_autorange(min_run_time=0.2).times)
