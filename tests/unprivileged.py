"""Acting as a user for whom the permissions of files count, also in tests that root runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def public_folder() -> Iterator[Path]:
    """Yield a folder that every user can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def unprivileged(owned: Path | None = None) -> Iterator[None]:
    """Give up the rights of root inside the block. `owned`: a folder that belongs to the user of the block."""
    user = os.geteuid()
    if user == 0:
        for path in () if owned is None else (owned, *owned.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
