"""Snapshots: named copies of the trained weights that follow them at their own pace.

snapshot ← decay · snapshot + (1 − decay) · θ once a step, so a decay of 0 is a copy, 0.99 a slow average and 1 a frozen
one; difrl/core/snapshot_schedules.py has decays that make a soup or a periodic reset of it. Using a snapshot puts its storage in
the place of the parameters' for the time of a `with` block. That is cheap, but autograd knows nothing of it: a
differentiable pass and its backward pass must lie on the same side of every exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from difrl.core import Coefficient

CURRENT = "current"
BASE = "base"
SUMMED = 2**20
"""Weights summed at once: on a CPU torch would make float64 copies of what it sums in float64, which tear holes into the heap."""


class Copy:
    """A copy of parameters on a device of its own (default: theirs); in CPU memory it is pinned where there is a GPU."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device | str | None = None) -> None:
        self.parameters = parameters
        self.tensors = {name: _stored(p.detach(), device) for name, p in parameters.items()}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the parameters are the copy's; it is brought to their device for that time."""
        own = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = self.tensors[name].to(own[name].device, non_blocking=True)
            torch.clear_autocast_cache()  # it knows parameters, not what they hold
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]
            torch.clear_autocast_cache()

    @torch.no_grad()
    def move_towards(self, share: float) -> None:
        """Goes this share of the way to the parameters. Computed on their device, so that the bits do not tell where it is."""
        if share == 0:
            return
        sources = [p.detach() for p in self.parameters.values()]
        moved = [tensor.to(p.device) for tensor, p in zip(self.tensors.values(), sources, strict=True)]
        torch._foreach_lerp_(moved, sources, share)
        for tensor, result in zip(self.tensors.values(), moved, strict=True):
            if tensor is not result:
                tensor.copy_(result)


def _stored(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    if device is None or torch.device(device).type == tensor.device.type:
        return tensor.clone()
    away = tensor.to(device)
    return away.pin_memory() if away.device.type == "cpu" and tensor.is_cuda else away


class Snapshots:
    """Copies of `parameters` by name. `base` is a context manager in which the model is the pretrained one."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decays: Mapping[str, Coefficient],
        base: Callable[[], AbstractContextManager[None]],
        device: torch.device | str | None = None,
    ) -> None:
        """device: where copies stay while they are not in use; default: where the parameters are."""
        self.parameters, self.decays, self._base = dict(parameters), dict(decays), base
        self.copies = {name: Copy(self.parameters, device) for name in decays}
        self._used: str | None = None

    @property
    def names(self) -> list[str]:
        """Every name that `use` takes."""
        return [CURRENT, BASE, *self.copies]

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Inside the block the model has the weights of the snapshot. A block may use the same again, no other one."""
        if name not in self.names:
            raise ValueError(f"no snapshot {name!r}; expected one of {self.names} (declare it under snapshots)")
        if name == (self._used or CURRENT):
            yield
            return
        if self._used is not None:
            raise RuntimeError(f"snapshot {name!r} asked for while {self._used!r} is in use; leave that one first")
        self._used = name
        try:
            with self._base() if name == BASE else self.copies[name].swapped_in():
                yield
        finally:
            self._used = None

    def update(self, step: int) -> None:
        """Moves every snapshot towards the trained weights by the decay it has after this step."""
        for name, copy in self.copies.items():
            copy.move_towards(1 - self.decays[name].value(step))

    def is_current(self, name: str) -> bool:
        """Whether a snapshot holds the very weights of θ now. What `base` holds is not looked at: False."""
        if name not in self.copies:
            return name == CURRENT
        copy = self.copies[name].tensors
        return all(torch.equal(p, copy[key].to(p.device)) for key, p in self.parameters.items())

    @torch.no_grad()
    def fingerprint(self, name: str) -> Tensor:
        """The sum of the weights under a snapshot, float64 [1], adapters of LoRA included also where `base` leaves them out."""
        with self.use(name), torch.no_grad():
            pieces = [piece for p in self.parameters.values() for piece in p.flatten().split(SUMMED)]
            scratch = torch.empty(SUMMED, dtype=torch.float64, device=pieces[0].device)
            return torch.stack([scratch[: len(piece)].copy_(piece).sum() for piece in pieces]).sum()[None]

    def state(self) -> dict[str, Tensor]:
        """Every copy, flat, as `snapshot/parameter`."""
        return {f"{name}/{key}": value for name, copy in self.copies.items() for key, value in copy.tensors.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        expected, found = set(self.state()), set(state)
        if expected != found:
            missing, surplus = sorted(expected - found)[:3], sorted(found - expected)[:3]
            raise ValueError(
                f"the checkpoint's snapshots are not this run's: missing {missing}, unexpected {surplus}; "
                "resume with the snapshots section the run was started with"
            )
        for name, value in self.state().items():
            value.copy_(state[name])
