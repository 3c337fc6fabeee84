"""The places of a model's weights: whole on every process, or sharded over the processes by torch's FSDP2 (`fully_shard`).

A policy works with the *parts* of the trained parameters that its process holds. Where weights are whole, a part is the whole
tensor, so averages, exchanges and sums are one code for both layouts.

Under FSDP2 each block of the network gathers its weights before it computes and gives them up afterwards. So every pass is
a collective operation: all processes must make equally many, in one order. Inside `gathered` whole weights stay on every
process, and passes are its own affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from difrl.config import ModelConfig
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.dtypes import DTYPES


class Layout:
    """Whole weights on every process. Gradients are summed by the processes themselves, once an update."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Lay out trained parameters, given by name."""
        self.parameters = dict(parameters)

    def local(self, tensor: Tensor) -> Tensor:
        """Return this process's part of a parameter, a gradient or a moment. It shares the storage."""
        return tensor

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole tensor whose parts lie as those of a parameter. All processes must call it."""
        return part

    def part(self, name: str, whole: Tensor | None) -> Tensor:
        """Return this process's part of a whole tensor of a parameter's shape and type, which only the main process gives."""
        if _count() == 1:
            assert whole is not None
            return whole
        parameter = self.parameters[name]
        sent = torch.empty_like(parameter) if whole is None else whole.to(parameter.device)
        dist.broadcast(sent, src=0)
        return sent

    def active(self) -> Mapping[str, Tensor]:
        """Return the tensors that passes read at this moment, by the name of their parameter."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def all_agree(self, flag: bool) -> bool:
        """Return whether the flag is set on every process that holds a part. All processes must call it."""
        return flag

    def largest(self, counts: Sequence[int]) -> Sequence[int]:
        """Return the number of passes of each kind that this process must make, if it needs `counts` itself."""
        return counts

    def number(self, tensor: Tensor) -> float:
        """Return a number that was computed from parts, such as the norm of a gradient. All processes must call it."""
        return float(tensor)

    def sum_gradients(self, processes: DistributedContext) -> None:
        """Make every gradient the sum over processes."""
        processes.sum_gradients(self.parameters.values())

    @property
    def is_gathered(self) -> bool:
        """Whether passes of this process need no other process."""
        return True

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold whole weights on every process inside the block. All processes must enter it."""
        yield

    @contextmanager
    def materialised(self) -> Iterator[None]:
        """Let the module of the main process hold whole trained weights inside the block, to be saved. All must enter it."""
        yield


class ShardedLayout(Layout):
    """Weights sharded over the processes by FSDP2, with the gradients and the optimizer's moments."""

    def __init__(self, module: nn.Module, model: ModelConfig, device: torch.device) -> None:
        self.module = module
        self.networks = networks(module)
        self.units = {
            unit: reshard for network in self.networks for unit, reshard in shard(network, model, device).items()
        }
        # Remembered now: while a unit is gathered, its modules hold other parameters.
        super().__init__({name: p for name, p in module.named_parameters() if p.requires_grad})
        self._gathered = False

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def whole(self, name: str, part: Tensor) -> Tensor:
        p: Any = self.parameters[name]
        whole = DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
        return whole.full_tensor()

    def part(self, name: str, whole: Tensor | None) -> Tensor:
        p: Any = self.parameters[name]
        sent = torch.empty(p.shape, dtype=p.dtype, device=p.device) if whole is None else whole.to(p.device)
        return distribute_tensor(sent, p.device_mesh, p.placements).to_local()

    def active(self) -> Mapping[str, Tensor]:
        if self._gathered:
            return {name: p.detach() for name, p in self.module.named_parameters() if name in self.parameters}
        for unit in self.units:  # a unit that is still gathered would not notice that its part changes
            unit.reshard()
        return {name: self.local(p.detach()) for name, p in self.parameters.items()}

    def all_agree(self, flag: bool) -> bool:
        return bool(self._largest([not flag])[0] == 0)

    def largest(self, counts: Sequence[int]) -> Sequence[int]:
        return counts if self._gathered else self._largest(counts)

    def _largest(self, counts: Sequence[int]) -> list[int]:
        found = torch.tensor(list(map(int, counts)), device=next(iter(self.parameters.values())).device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [int(count) for count in found.tolist()]

    def number(self, tensor: Tensor) -> float:
        return float(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)

    def sum_gradients(self, processes: DistributedContext) -> None:
        for p in self.parameters.values():  # FSDP has summed the others in the backward pass
            if p.grad is None:
                p.grad = torch.zeros_like(p)

    @property
    def is_gathered(self) -> bool:
        return self._gathered

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self._gathered:
            yield
            return
        for unit in self.units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.reshard()
            unit.unshard()
        self._gathered = True
        try:
            yield
        finally:
            self._gathered = False
            for unit, reshard in self.units.items():
                unit.set_reshard_after_forward(reshard, recurse=False)
                unit.reshard()

    @contextmanager
    def materialised(self) -> Iterator[None]:
        with ExitStack() as stack:
            for unit in self.units:
                unit.reshard()
            for name, p in self.parameters.items():
                whole = self.whole(name, self.local(p.detach()))
                if dist.get_rank() == 0:
                    place, _, leaf = name.rpartition(".")
                    holder = self.module.get_submodule(place)._parameters
                    stack.callback(holder.__setitem__, leaf, holder[leaf])
                    holder[leaf] = nn.Parameter(whole.cpu(), requires_grad=True)
            for network in self.networks:  # libraries write the name of the class
                stack.callback(setattr, network, "__class__", type(network))
                network.__class__ = type(network).__mro__[2]
            yield


def networks(module: nn.Module) -> list[nn.Module]:
    """Return the networks of a trained module: several denoisers are called on their own, the dictionary of them never."""
    return list(module.values()) if isinstance(module, nn.ModuleDict) else [module]


def is_sharded(model: ModelConfig) -> bool:
    """Return whether the weights of a model are sharded: a single process holds them whole."""
    return model.shard != "none" and _count() > 1


def build_layout(module: nn.Module, model: ModelConfig, device: torch.device | str) -> Layout:
    """Lay out the weights of a module by `model.shard`.

    Sharded weights may come from another device: a block at a time is moved to `device` whole.
    """
    if not is_sharded(model):
        return Layout({name: p for name, p in module.named_parameters() if p.requires_grad})
    return ShardedLayout(module, model, torch.device(device))


def shard(network: nn.Module, model: ModelConfig, device: torch.device | str) -> dict[FSDPModule, bool]:
    """Shard a network by blocks, each of which is moved to the device whole.

    Return its units, and whether each gives up its weights after the forward pass. What is in no block forms a unit with the
    network itself. It stays gathered from the forward to the backward pass.
    """
    dtype, mesh = DTYPES[model.dtype], init_device_mesh(torch.device(device).type, (_count(),))
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    precision = MixedPrecisionPolicy() if dtype == torch.float32 else half
    units = dict[FSDPModule, bool]()
    for unit in [*find_blocks(network), network]:
        reshard = unit is not network and model.shard == "weights"
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, mp_policy=precision)
        assert isinstance(unit, FSDPModule)
        # The loss is divided by the global count, so gradients are summed. Not every backend can scale in the reduction.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        units[unit] = reshard
    return units


def find_blocks(network: Any) -> list[nn.Module]:
    """Return the blocks of a network that are gathered at once, inner ones first: those that its library never splits.

    Without such a list, they are the members of the lists that the network holds.
    """
    names = {*(getattr(network, "_no_split_modules", None) or ()), *(getattr(network, "_repeated_blocks", None) or ())}
    blocks = [module for module in network.modules() if type(module).__name__ in names and module is not network]
    lists = [part for part in network.children() if isinstance(part, nn.ModuleList)]
    return list(reversed(blocks or [block for part in lists for block in part]))


def _count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
