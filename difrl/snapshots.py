"""Snapshots: named copies of the trained weights that follow them at their own pace.

snapshot ← decay · snapshot + (1 − decay) · θ once a step, so a decay of 0 is a copy, 0.99 a slow average and 1 a frozen
one. Using a snapshot exchanges the storage of the parameters for the time of a `with` block. That is cheap, but autograd
knows nothing of it: a differentiable pass and its backward pass must lie on the same side of every exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from difrl.core import Coefficient

CURRENT = "current"
BASE = "base"


class Snapshots:
    """Copies of `parameters` by name. `base` is a context manager in which the model is the pretrained one."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decays: Mapping[str, Coefficient],
        base: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.parameters, self.decays, self._base = dict(parameters), dict(decays), base
        self.copies = {name: self._copy() for name in decays}

    def _copy(self) -> dict[str, Tensor]:
        return {key: p.detach().clone() for key, p in self.parameters.items()}

    @property
    def names(self) -> list[str]:
        """Every name that `use` takes."""
        return [CURRENT, BASE, *self.copies]

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Inside the block the model has the weights of the snapshot."""
        if name == CURRENT:
            yield
        elif name == BASE:
            with self._base():
                yield
        elif name in self.copies:
            copy = self.copies[name]
            self._exchange(copy)
            try:
                yield
            finally:
                self._exchange(copy)
        else:
            raise ValueError(f"no snapshot {name!r}; expected one of {self.names} (declare it under snapshots)")

    def _exchange(self, copy: dict[str, Tensor]) -> None:
        for key, p in self.parameters.items():
            p.data, copy[key] = copy[key], p.data

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves every snapshot towards the trained weights by the decay it has at this step."""
        for name, copy in self.copies.items():
            towards = 1 - self.decays[name].value(step)
            torch._foreach_lerp_(list(copy.values()), [p.detach() for p in self.parameters.values()], towards)

    def state(self) -> dict[str, Tensor]:
        """Every copy, flat, as `snapshot/parameter`."""
        return {f"{name}/{key}": value for name, copy in self.copies.items() for key, value in copy.items()}

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
        for name, copy in self.copies.items():
            for key, value in copy.items():
                value.copy_(state[f"{name}/{key}"])
