"""Snapshots: named copies of the trained weights that move towards them once a step.

    snapshot ← decay · snapshot + (1 − decay) · θ

A decay of 0 is a copy, 0.99 a slow average and 1 a frozen copy; difrl/core/snapshot_schedules.py has decays for soups and
periodic resets. For the time of a `with` block the contents of a snapshot and of the parameters are exchanged. So the copy
holds θ meanwhile, and a differentiable pass and its backward pass must lie on the same side of every exchange: autograd
refuses a backward pass whose weights have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

from difrl.core import Coefficient
from difrl.policies.layout import Layout

CURRENT = "current"
BASE = "base"
SUMMED = 2**20
"""Weights summed at once. On a CPU, a float64 sum makes float64 copies of its operand, and large ones fragment the heap."""


class Copy:
    """A copy of the trained parameters, in the parts that the process holds of them.

    It is on its own device (default: theirs). In CPU memory it is pinned if the parameters are on a GPU.
    """

    def __init__(self, layout: Layout, device: torch.device | str | None = None) -> None:
        self.layout = layout
        self.tensors = {name: _copy_to(layout.local(p.detach()), device) for name, p in layout.parameters.items()}
        self._gathered: dict[str, Tensor] | None = None

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Exchange the contents of the copy and of the parameters inside the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        own, other = self.layout.active(), self._gathered or self.tensors
        done = list[str]()
        try:
            for name, tensor in own.items():
                _exchange(tensor, other[name])
                done.append(name)
        except BaseException:  # a shortage of memory, or Ctrl-C: no mixture of two sets of weights may be left
            for name in done:
                _exchange(own[name], other[name])
            raise
        finally:
            torch.clear_autocast_cache()  # it is keyed by parameters, not by their values

    @property
    def is_gathered(self) -> bool:
        """Whether every process holds a whole copy at this moment."""
        return self._gathered is not None

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold a whole copy on every process, to be exchanged with whole weights. To be entered while these are gathered."""
        active = self.layout.active()
        whole = {name: self.layout.whole(name, part.to(active[name].device)) for name, part in self.tensors.items()}
        self._gathered = {name: tensor.to(active[name].dtype) for name, tensor in whole.items()}
        try:
            yield
        finally:
            self._gathered = None

    @torch.no_grad()
    def move_towards(self, share: float) -> None:
        """Move the copy towards the parameters by `share`. The arithmetic runs on their device, so all copies have equal bits."""
        if share == 0:
            return
        sources = [self.layout.local(p.detach()) for p in self.layout.parameters.values()]
        moved = [tensor.to(p.device) for tensor, p in zip(self.tensors.values(), sources, strict=True)]
        torch._foreach_lerp_(moved, sources, share)
        for tensor, result in zip(self.tensors.values(), moved, strict=True):
            if tensor is not result:
                tensor.copy_(result)


def _exchange(one: Tensor, other: Tensor) -> None:
    """Exchange the contents of two tensors. If that fails, both are as before."""
    kept = one.clone()
    try:
        one.copy_(other, non_blocking=True)
        other.copy_(kept)
    except BaseException:
        one.copy_(kept)
        raise


def _copy_to(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    if device is None or tensor.is_meta or torch.device(device).type == tensor.device.type:
        return tensor.clone()
    away = tensor.to(device)
    return away.pin_memory() if away.device.type == "cpu" and tensor.is_cuda else away


class Snapshots:
    """Named copies of the parameters of a layout. `base` gives a context in which the model is the pretrained one."""

    def __init__(
        self,
        layout: Layout,
        decays: Mapping[str, Coefficient],
        base: Callable[[], AbstractContextManager[None]],
        device: torch.device | str | None = None,
        pretrained: Copy | None = None,
    ) -> None:
        """device: device of copies that are not in use; default: that of the parameters. pretrained: the copy behind `base`."""
        self.layout, self.parameters, self.decays, self._base = layout, layout.parameters, decays, base
        self.device, self.pretrained = device, pretrained
        self.copies = {name: Copy(layout, device) for name in decays}
        self._current = CURRENT
        self._used: str | None = None

    @property
    def names(self) -> list[str]:
        """The names that `use` accepts."""
        return [CURRENT, BASE, *self.copies]

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Give the model the weights of the snapshot inside the block. A block may use the same again, but no other one."""
        if not self._must_exchange(name):
            yield
            return
        self._used = name
        try:
            with self._base() if name == BASE else self.copies[name].swapped_in():
                yield
        finally:
            self._used = None

    def _must_exchange(self, name: str) -> bool:
        """Return whether the model must be given other weights to have those of a snapshot."""
        if name not in self.names:
            raise ValueError(f"no snapshot {name!r}; expected one of {self.names} (declare it under snapshots)")
        if name == self._used or (self._used is None and name in (CURRENT, self._current)):
            return False
        if self._used is not None:
            raise RuntimeError(f"snapshot {name!r} cannot be used while {self._used!r} is in use; leave that one first")
        return True

    @contextmanager
    def as_current(self, name: str) -> Iterator[None]:
        """Let a snapshot be θ inside the block, for evaluations and for the result. Other snapshots may be used there."""
        if self._used is not None or self._current != CURRENT:
            raise RuntimeError(
                f"snapshot {name!r} cannot become current while {self._used or self._current!r} is in use"
            )
        self._current = name
        try:
            with nullcontext() if name == CURRENT else self.copies[name].swapped_in():
                yield
        finally:
            self._current = CURRENT

    @contextmanager
    def gathered(self, *names: str) -> Iterator[None]:
        """Hold whole weights of θ and of these snapshots on every process, so that passes are no collective operations.

        All processes must enter it, with no snapshot in use. Where weights are whole in any case, it does nothing.
        """
        if self.layout.is_gathered:
            yield
            return
        copies = {BASE: self.pretrained, **self.copies}
        with self.layout.gathered(), ExitStack() as stack:
            for copy in {copies.get(name) for name in names} - {None}:
                assert copy is not None
                stack.enter_context(copy.gathered())
            yield

    def update(self, step: int) -> None:
        """Move every snapshot towards the trained weights, by its decay after this step."""
        for name, copy in self.copies.items():
            copy.move_towards(1 - self.decays[name].value(step))

    def is_current(self, name: str) -> bool:
        """Return whether a snapshot holds exactly the weights of θ now. `base` is not compared: False.

        All processes must call it, with no snapshot in use.
        """
        if name not in self.copies:
            return name == CURRENT
        own, copy = self._parts(CURRENT), self._parts(name)
        return self.layout.all_agree(all(torch.equal(p, copy[key].to(p.device)) for key, p in own.items()))

    @torch.no_grad()
    def fingerprint(self, name: str) -> Tensor:
        """Return the sum of this process's part of the weights of a snapshot, float64 [1]. Adapters count for `base` too."""
        device = next(iter(self.parameters.values())).device
        pieces = [piece for part in self._parts(name).values() for piece in part.flatten().split(SUMMED)]
        scratch = torch.empty(SUMMED, dtype=torch.float64, device=device)
        return torch.stack([scratch[: len(piece)].copy_(piece).sum() for piece in pieces]).sum()[None]

    def _parts(self, name: str) -> Mapping[str, Tensor]:
        """Return this process's part of the weights of a snapshot that is in use or could be."""
        copy = self.pretrained if name == BASE else self.copies.get(name)
        if copy is not None and (self._must_exchange(name) or copy.is_gathered):
            return (
                copy.tensors
            )  # gathered weights are exchanged with a gathered copy, so the parts stay in their places
        return {key: self.layout.local(p.detach()) for key, p in self.parameters.items()}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of every copy as `snapshot/parameter`."""
        return {f"{name}/{key}": value for name, copy in self.copies.items() for key, value in copy.tensors.items()}
