"""Free CPU memory, and out-of-memory errors as messages with the settings that reduce memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from difrl.runtime.errors import UserError
from rewards.memory import is_out_of_memory


class MemoryShortage(UserError):
    """A part of a run does not fit into memory."""


CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Folder of the limits of a container (cgroup v2)."""


def available_memory() -> int:
    """Return the bytes of CPU memory that are free: those of the machine, or of the container if it has fewer."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, StopIteration):  # no container, or no limit
        limit = int((CONTROL_GROUP / "memory.max").read_text())
        used = int((CONTROL_GROUP / "memory.current").read_text())
        lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
        # The cache of files counts as used, and gives way.
        cache = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        free = min(free, limit - used + cache)
    return free


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
