"""Memory: a budget that all requests of a server share, and errors that mean there was not enough."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import torch

POLL = 0.02
"""Seconds between two attempts to take bytes."""
# On the CPU torch raises a plain RuntimeError, and so does cuBLAS for its workspace.
_MESSAGES = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


class OverBudget(Exception):
    """A request that needs more than the whole budget."""


class Shortage(Exception):
    """A request whose bytes did not become free in time."""


class MemoryBudget:
    """Bytes that the requests of a server hold together, from the first byte of a body to the answer.

    A request takes bytes before it uses them: those of its body as they arrive, those of its decoded images once their
    headers are known. If they are not free, it waits up to `patience` seconds for other requests to end.
    """

    def __init__(self, total: int, patience: float) -> None:
        self.total, self.patience = total, patience
        self.held = 0
        self._lock = threading.Lock()

    @contextlib.asynccontextmanager
    async def share(self) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
        """Yield a function that takes bytes; the end of the block returns them all.

        It raises OverBudget if the share would exceed the budget, and Shortage if the bytes do not become free.
        """
        taken = 0

        async def take(size: int) -> None:
            nonlocal taken
            if taken + size > self.total:
                raise OverBudget(f"{(taken + size) / 1e6:.0f} MB of memory, expected at most {self.total / 1e6:.0f}")
            deadline = time.monotonic() + self.patience
            while not self._reserve(size):
                if time.monotonic() >= deadline:
                    raise Shortage(f"{self.held / 1e6:.0f} MB of memory are in use; {size / 1e6:.0f} more are too many")
                await asyncio.sleep(POLL)
            taken += size

        try:
            yield take
        finally:
            self._reserve(-taken)

    def _reserve(self, size: int) -> bool:
        """Add bytes to those in use, unless they would exceed the budget."""
        with self._lock:
            fits = self.held + size <= self.total
            self.held += size if fits else 0
            return fits


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is a shortage of memory on the CPU or an accelerator."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES):
            return True
        error = error.__cause__
    return False
