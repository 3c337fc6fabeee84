"""A shortage of memory, as a message that names the settings which need less of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from difrl.runtime.errors import UserError

# torch has no class of its own for a shortage on the CPU, nor cuBLAS for one in its workspace.
_WORDS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


class MemoryShortage(UserError):
    """A part of a step that does not fit into memory."""


@contextmanager
def enough_for(stage: str, advice: str) -> Iterator[None]:
    """Turns an out-of-memory error of the block, on a CPU or an accelerator, into a MemoryShortage with the advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise MemoryShortage(f"memory ran out in the {stage}: {advice}. ({_first_line(error)})") from error


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _WORDS)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
