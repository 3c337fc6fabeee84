"""The cost of one evaluation of a model, counted on the meta device: nothing is computed and no memory is used.

Matrix products and convolutions are counted as they are called. So the count is right also for models that do not send
every token through every weight (an MMDiT has one set for image tokens and one for text tokens).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """The cost of one evaluation of one sample."""

    forward: int
    """FLOPs without gradient."""
    training: int
    """FLOPs with gradient: forward and backward. Recomputed activations take the forward once more."""
    activations: int
    """Bytes that are stored between forward and backward."""
    recomputed: int | None = None
    """The same if blocks recompute theirs, with those of the largest one. None if the module marks no blocks."""


def count_call_cost(module: nn.Module, call: Callable[[], Tensor]) -> Cost:
    """Count the cost of a call of a module on the meta device, whose blocks may recompute activations by torch's checkpoint."""
    kept = KeptStorages(p.untyped_storage() for p in [*module.parameters(), *module.buffers()])
    checkpoint = patch.object(torch.utils.checkpoint, "checkpoint", kept.run_block)
    with checkpoint, _FusedAttention(), FlopCounterMode(display=False) as counter:
        with kept:
            output = call()
        forward = counter.get_total_flops()
        output.sum().backward()
    recomputed = kept.bytes + kept.largest_block if kept.largest_block else None
    return Cost(forward, counter.get_total_flops(), kept.all_bytes, recomputed)


def count_live_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes that a call without gradient holds at a time on the meta device, beside what it was given."""
    with torch.no_grad(), _FusedAttention(), _LiveStorages() as live:
        call()
    peak: int = live.peak
    return peak


class _LiveStorages(TorchDispatchMode):
    """The storages that are made and not yet freed inside a `with` block."""

    def __init__(self) -> None:
        initialise: Callable[[], None] = super().__init__  # which has no types
        initialise()
        self.sizes: dict[int, int] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes and storage._cdata not in given:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    self.peak = max(self.peak, self.bytes)
                    weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, address: int) -> None:
        self.bytes -= self.sizes.pop(address)


class KeptStorages(saved_tensors_hooks):
    """The storages that autograd keeps inside a `with` block, beside known ones such as weights. Each counts once."""

    def __init__(self, known: Iterable[UntypedStorage]) -> None:
        super().__init__(self.keep, lambda tensor: tensor)
        # By address. They are kept alive, so that no address is used again.
        self.known = {storage._cdata: storage for storage in known}
        self.own: dict[int, UntypedStorage] = {}
        self.inputs: dict[int, UntypedStorage] = {}
        """Those of the inputs of recomputed blocks."""
        self.blocks: list[KeptStorages] = []
        """Those inside the blocks that may be recomputed."""

    @property
    def bytes(self) -> int:
        """Bytes of the storages, with the inputs of recomputed blocks, and without what is inside."""
        return _sum_bytes(self.own | self.inputs)

    @property
    def largest_block(self) -> int:
        """Bytes of the largest block beside inputs; one is alive at a time where blocks are recomputed."""
        kept = self.own | self.inputs
        blocks = ({k: v for k, v in block.own.items() if k not in kept} for block in self.blocks)
        return max(map(_sum_bytes, blocks), default=0)

    @property
    def all_bytes(self) -> int:
        """Bytes that are kept if no block is recomputed."""
        return _sum_bytes({key: storage for part in (*self.blocks, self) for key, storage in part.own.items()})

    def keep(self, tensor: Tensor) -> Tensor:
        """Count the storage of a tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.own[storage._cdata] = storage
        return tensor

    def run_block(self, block: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
        """Run a block in the place of torch's checkpoint, which keeps only its inputs."""
        for storage in (arg.untyped_storage() for arg in args if isinstance(arg, Tensor)):
            if storage._cdata not in self.known:
                self.inputs[storage._cdata] = storage
        self.blocks.append(KeptStorages(self.known.values()))
        with self.blocks[-1]:
            return block(*args, **kwargs)


def _sum_bytes(storages: Mapping[int, UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())


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
