"""The state of an optimizer of torch, torchao or bitsandbytes as tensors of a checkpoint.

    name/exp_avg           a moment of a parameter, whole
    name/exp_avg/codes     an inner tensor of a moment in few bits (torchao), if every process holds the whole moment
    1/name/exp_avg/codes   the same of process 1, if the parameters are sharded: every part is rounded in blocks of its own

Processes in the same number find their parts again, bit for bit. In any other layout such moments are laid out in float32 and
rounded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from difrl.policies.layout import Layout
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.tensor_file import TensorSpec
from difrl.training.checkpoint.folder import CheckpointError
from difrl.training.checkpoint.tensors import Entry, TensorFile

COUNT = "step"
"""Key of the number of steps, which is the same for all parameters."""
ENDS = ("", "/codes", "/scale", "/qmap")
"""Ends of names: a tensor as it is, and the inner tensors of torchao's moments."""
Moments = Mapping[tuple[str, str], Tensor]
"""Name of a parameter and key of its state -> the tensor."""


def list_entries(
    optimizer: torch.optim.Optimizer, layout: Layout, processes: DistributedContext
) -> tuple[list[Entry], int]:
    """Return the state of an optimizer, and the number of its steps. All processes must call it."""
    moments, steps = _moments(optimizer, layout), 0
    for state in optimizer.state.values():
        steps = int(state.get(COUNT, 1))  # some optimizers need none
    if processes.any(any(_is_divided(layout, value) for value in moments.values())):
        return _list_parts(_inner_tensors(layout, moments), processes), steps
    entries = list[Entry]()
    for (name, key), value in moments.items():
        part = layout.local(value)
        if part is value:
            entries += [Entry.of(f"{name}/{key}{end}", inner) for end, inner in _inner(part).items()]
        else:
            entries.append(Entry(TensorSpec.of(f"{name}/{key}", value), partial(layout.whole, name, part)))
    return entries, steps


def _list_parts(own: Mapping[str, Tensor], processes: DistributedContext) -> list[Entry]:
    """Return the tensors of all processes, each with the number of its process before its name."""

    def gather(rank: int, spec: TensorSpec) -> Tensor:
        mine = own[spec.name] if rank == processes.rank else torch.empty(0, dtype=spec.dtype)
        bits = mine.contiguous().reshape(-1).view(torch.uint8).to(processes.device)
        return processes.gather_ragged(bits)[rank].view(spec.dtype).reshape(spec.shape)

    found = processes.gather_objects([TensorSpec.of(name, tensor) for name, tensor in own.items()])
    return [
        Entry(TensorSpec(f"{rank}/{spec.name}", spec.dtype, spec.shape), partial(gather, rank, spec))
        for rank, specs in enumerate(found)
        for spec in specs
    ]


@torch.no_grad()
def load(
    optimizer: torch.optim.Optimizer, layout: Layout, file: TensorFile, steps: int, processes: DistributedContext
) -> None:
    """Restore the state of an optimizer after a number of steps. The parameters must be loaded afterwards.

    All processes must call it. Raise CheckpointError if the state is not that of this optimizer.
    """
    if steps == 0:
        return
    _make_buffers(optimizer)
    for state in optimizer.state.values():
        if COUNT in state:
            count = state[COUNT]
            state[COUNT] = torch.full_like(count, steps) if isinstance(count, Tensor) else steps
    moments = _moments(optimizer, layout)
    divided = processes.any(any(_is_divided(layout, value) for value in moments.values()))
    if divided and _load_parts(_inner_tensors(layout, moments), file, processes):
        return
    for (name, key), value in moments.items():
        part = layout.local(value)
        inner = {f"{name}/{key}{end}": tensor for end, tensor in _inner(part).items()}
        if part is value and all(file.specs.get(n) == TensorSpec.of(n, tensor) for n, tensor in inner.items()):
            for n, tensor in inner.items():
                tensor.copy_(file.receive(n))
        else:
            part.copy_(layout.part(name, _read_whole(file, name, key, value.shape)))


def _load_parts(own: Mapping[str, Tensor], file: TensorFile, processes: DistributedContext) -> bool:
    """Load the parts of this process. Return False if those of the file are of another layout, or whole."""
    expected = {f"{processes.rank}/{name}": tensor for name, tensor in own.items()}
    same = all(file.specs.get(name) == TensorSpec.of(name, tensor) for name, tensor in expected.items())
    if not processes.all(same) or processes.sum(torch.tensor(len(own), device=processes.device)) != len(file.specs):
        return False
    for name in file.specs:
        received = file.receive(name)
        if name in expected:
            expected[name].copy_(received)
    return True


def _read_whole(file: TensorFile, name: str, key: str, shape: torch.Size) -> Tensor | None:
    """Return a moment of any layout in float32 on the main process, None on the others."""
    whole, parts = f"{name}/{key}", list[dict[str, str]]()
    for place in (whole, *(f"{rank}/{whole}" for rank in range(len(file.specs)))):
        if found := {end: place + end for end in ENDS if place + end in file.specs}:
            parts.append(found)
        elif place != whole:
            break
    if not parts:
        raise CheckpointError(
            f"the checkpoint {file.place} lacks {whole}, which the optimizer of this run keeps; resume with the train "
            "section that the run was started with"
        )
    if not file.processes.is_main:
        return None
    return torch.cat([_widen(file, part).flatten() for part in parts]).reshape(shape)


def _moments(optimizer: torch.optim.Optimizer, layout: Layout) -> Moments:
    states = {name: optimizer.state.get(p, {}) for name, p in layout.parameters.items()}
    return {(name, key): value for name, state in states.items() for key, value in state.items() if key != COUNT}


def _inner(part: Tensor) -> dict[str, Tensor]:
    """Return the tensors that make up a tensor, by the ends of their names."""
    if not is_traceable_wrapper_subclass(part):
        return {"": part}
    return {f"/{name}": getattr(part, name) for name in part.__tensor_flatten__()[0]}


def _inner_tensors(layout: Layout, moments: Moments) -> dict[str, Tensor]:
    return {
        f"{name}/{key}{end}": tensor
        for (name, key), value in moments.items()
        for end, tensor in _inner(layout.local(value)).items()
    }


def _is_divided(layout: Layout, value: Tensor) -> bool:
    """Return whether a process holds a part of a tensor that cannot be joined with others as it is."""
    part = layout.local(value)
    return part is not value and is_traceable_wrapper_subclass(part)


def _widen(file: TensorFile, names: Mapping[str, str]) -> Tensor:
    """Return the values of a moment in few bits, float32: those of its codes in the table, times the scale of their block."""
    tensors = {end: file.get(name) for end, name in names.items()}
    if "" in tensors:
        return tensors[""]
    codes, scale, table = tensors["/codes"], tensors["/scale"], tensors.get("/qmap")
    if table is not None and len(table) == 16:  # two codes in a byte
        codes = torch.stack([codes >> 4, codes & 15], dim=-1)
    values = codes.float() if table is None else table[codes.int()]
    return values.reshape(len(scale), -1) * scale[:, None]


def _make_buffers(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer make the tensors of its state, by a step of learning rate 0."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0 * group["lr"]
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()
