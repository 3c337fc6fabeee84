"""Transition kernels by name: those of samplers, and those that other packages register."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticKnownError

from difrl.runtime.registry import Registry

if TYPE_CHECKING:
    from samplers import Grid, Kernel


@dataclass(frozen=True)
class KernelEntry:
    """A kernel that `rollout.kernel` can name."""

    build: Callable[[float, Grid], Kernel]
    """(noise_level, grid) -> the kernel."""
    highest_noise: float = math.inf
    """The largest noise_level that it takes; 0 for a deterministic kernel."""


KERNEL_ENTRIES = Registry[KernelEntry]("kernel", "difrl.kernels")


def register_kernel(name: str, build: Callable[[float, Grid], Kernel], highest_noise: float = math.inf) -> None:
    """Make a kernel available as `rollout.kernel: NAME`. Raise ValueError if another kernel has that name."""
    KERNEL_ENTRIES.register(name, KernelEntry(build, highest_noise))


def _build_shipped(name: str, noise_level: float, grid: Grid) -> Kernel:
    from samplers import make_kernel

    return make_kernel(name, noise_level, grid)


# The ranges are those of samplers.kernels.KERNELS, which a test compares: importing it here would import torch.
for _name, _highest in {
    "ode": 0.0,
    "ddim": 1.0,
    "cps": 1.0,
    "precise": math.inf,
    "flow_sde": math.inf,
    "dance_sde": math.inf,
}.items():
    register_kernel(_name, partial(_build_shipped, _name), _highest)


def _check_known(name: str) -> str:
    try:
        KERNEL_ENTRIES[name]
    except LookupError as error:
        *most, last = (f"'{known}'" for known in KERNEL_ENTRIES.names())
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(most)} or {last}"}) from error
    return name


KernelName = Annotated[str, AfterValidator(_check_known)]
