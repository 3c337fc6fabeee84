"""Snapshots: named copies of the trained weights that move towards them once a step.

    snapshot ← decay · snapshot + (1 − decay) · θ

A decay of 0 is a copy, 0.99 a slow average and 1 a frozen copy; difrl/core/snapshot_schedules.py has decays for soups and
periodic resets. For the time of a `with` block the storage of a snapshot takes the place of the parameters'. That is cheap,
but autograd does not notice it: a differentiable pass and its backward pass must lie on the same side of every exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from difrl.core import Coefficient

CURRENT = "current"
BASE = "base"
IN_USE = "copy of the weights in use"
SUMMED = 2**20
"""Weights summed at once. On a CPU, a float64 sum makes float64 copies of its operand, and large ones fragment the heap."""


class Copy:
    """A copy of parameters on its own device (default: theirs). In CPU memory it is pinned if the parameters are on a GPU."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device | str | None = None) -> None:
        self.parameters = parameters
        self.tensors = {name: _copy_to(p.detach(), device) for name, p in parameters.items()}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the copy in the place of the parameters inside the block. It is moved to their device for that time."""
        own = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = self.tensors[name].to(own[name].device, non_blocking=True)
            torch.clear_autocast_cache()  # it is keyed by parameters, not by their values
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]
            torch.clear_autocast_cache()

    @torch.no_grad()
    def move_towards(self, share: float) -> None:
        """Move the copy towards the parameters by `share`. The arithmetic runs on their device, so all copies have equal bits."""
        if share == 0:
            return
        sources = [p.detach() for p in self.parameters.values()]
        moved = [tensor.to(p.device) for tensor, p in zip(self.tensors.values(), sources, strict=True)]
        torch._foreach_lerp_(moved, sources, share)
        for tensor, result in zip(self.tensors.values(), moved, strict=True):
            if tensor is not result:
                tensor.copy_(result)


def _copy_to(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    if device is None or tensor.is_meta or torch.device(device).type == tensor.device.type:
        return tensor.clone()
    away = tensor.to(device)
    return away.pin_memory() if away.device.type == "cpu" and tensor.is_cuda else away


class Snapshots:
    """Named copies of `parameters`. `base` gives a context in which the model is the pretrained one."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decays: Mapping[str, Coefficient],
        base: Callable[[], AbstractContextManager[None]],
        device: torch.device | str | None = None,
        pretrained: Copy | None = None,
    ) -> None:
        """device: device of copies that are not in use; default: that of the parameters. pretrained: the copy behind `base`."""
        self.parameters, self.decays, self._base = dict(parameters), dict(decays), base
        self.device, self.pretrained = device, pretrained
        self.copies = {name: Copy(self.parameters, device) for name in decays}
        self._used: str | None = None

    @property
    def names(self) -> list[str]:
        """The names that `use` accepts."""
        return [CURRENT, BASE, *self.copies]

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Give the model the weights of the snapshot inside the block. A block may use the same again, but no other one."""
        if name not in self.names:
            raise ValueError(f"no snapshot {name!r}; expected one of {self.names} (declare it under snapshots)")
        if name == (self._used or CURRENT):
            yield
            return
        if self._used is not None:
            raise RuntimeError(f"snapshot {name!r} cannot be used while {self._used!r} is in use; leave that one first")
        self._used = name
        try:
            with self._base() if name == BASE else self.copies[name].swapped_in():
                yield
        finally:
            self._used = None

    @contextmanager
    def as_current(self, name: str) -> Iterator[None]:
        """Let a snapshot be θ inside the block, for evaluations and for the result. Other snapshots may be used there."""
        if self._used is not None:
            raise RuntimeError(f"snapshot {name!r} cannot become current while {self._used!r} is in use")
        with nullcontext() if name == CURRENT else self.copies[name].swapped_in():
            yield

    def update(self, step: int) -> None:
        """Move every snapshot towards the trained weights, by its decay after this step."""
        for name, copy in self.copies.items():
            copy.move_towards(1 - self.decays[name].value(step))

    def is_current(self, name: str) -> bool:
        """Return whether a snapshot holds exactly the weights of θ now. `base` is not compared: False."""
        if name not in self.copies:
            return name == CURRENT
        copy = self.copies[name].tensors
        return all(torch.equal(p, copy[key].to(p.device)) for key, p in self.parameters.items())

    @torch.no_grad()
    def fingerprint(self, name: str) -> Tensor:
        """Return the sum of the weights under a snapshot, float64 [1]. Adapters of LoRA count for `base` too."""
        with self.use(name), torch.no_grad():
            pieces = [piece for p in self.parameters.values() for piece in p.flatten().split(SUMMED)]
            scratch = torch.empty(SUMMED, dtype=torch.float64, device=pieces[0].device)
            return torch.stack([scratch[: len(piece)].copy_(piece).sum() for piece in pieces]).sum()[None]

    def device_bytes(self) -> dict[str, int]:
        """Return the bytes of copies on the device of the parameters, by name. Of copies on another device, one is in use."""
        copies = {f"snapshot {name}": copy for name, copy in self.copies.items()}
        if self.pretrained is not None:
            copies["pretrained weights, kept"] = self.pretrained
        size = sum(p.nbytes for p in self.parameters.values())
        return dict.fromkeys(copies if self.device is None else [IN_USE] * bool(copies), size)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of every copy as `snapshot/parameter`."""
        return {f"{name}/{key}": value for name, copy in self.copies.items() for key, value in copy.tensors.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the copies from `state`. Raise ValueError if the names differ."""
        expected, found = set(self.state()), set(state)
        if expected != found:
            missing, surplus = sorted(expected - found)[:3], sorted(found - expected)[:3]
            raise ValueError(
                f"the checkpoint's snapshots are not those of this run: missing {missing}, unexpected {surplus}; "
                "resume with the snapshots section that the run was started with"
            )
        for name, value in self.state().items():
            value.copy_(state[name])
