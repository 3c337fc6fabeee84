"""Out-of-memory errors as messages with the settings that reduce memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from difrl.runtime.errors import UserError
from rewards.memory import is_out_of_memory


class MemoryShortage(UserError):
    """A part of a run does not fit into memory."""


@contextmanager
def enough_for(stage: str, advice: str) -> Iterator[None]:
    """Convert an out-of-memory error of the block, on a CPU or an accelerator, into a MemoryShortage with advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MemoryShortage(f"memory ran out in the {stage}: {advice}. ({first_line})") from error
