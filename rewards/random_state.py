"""The global random states of torch, numpy and Python, which loading a model must not move.

A reward may draw from them, and a resumed run restores them. But rewards load their models at the first call, which in a
resumed run is another call than in one that was never interrupted, and building a network draws its initial weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def get_random_state() -> dict[str, Tensor]:
    """Return the global random states of this process: of torch on CPU and GPU, numpy and Python."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        **({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}),
        "numpy": torch.from_numpy(np.array(keys, dtype=np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss_next is None else gauss_next], dtype=torch.float64),
    }


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore the result of `get_random_state`."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy_gauss"])))
    gauss = float(state["python_gauss"])
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the global random states after the block, or after each call of a function that this decorates."""
    before = get_random_state()
    try:
        yield
    finally:
        set_random_state(before)


class FirstCall:
    """The first call of a function that may build something for later calls, and that may draw random numbers."""

    def __init__(self) -> None:
        self.done = False

    def __call__(self, call: Callable[[], T]) -> T:
        """Return the result of `call`, from the random states as they would be if the function had been called before.

        The first time, it sees random states of its own, so what it builds is the same in every process and every run. If
        it drew from them, it is repeated with the present states: its draws may have been those of building.
        """
        if self.done:
            return call()
        with preserved_random_state():
            _seed(0)
            before = get_random_state()
            result = call()
            after = get_random_state()
        self.done = True
        drew = any(not torch.equal(after[name].nan_to_num(), state.nan_to_num()) for name, state in before.items())
        return call() if drew else result


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed a GPU that is not in use yet, later
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
