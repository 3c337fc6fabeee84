"""A lock on a folder that two processes must not write at once. The system releases it when its process ends, however it ends."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from difrl.runtime.errors import UserError

FILE = ".lock"
_held: set[int] = set()
"""Descriptors of the locks of this process."""


class FolderInUse(UserError):
    """Another process writes to the folder."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[str]:
    """Hold the lock on a folder, which is made if it is missing. Yield a warning where the lock is no protection, or "".

    Raise FolderInUse if another process holds it. Folders that were made here and are still empty at the end are removed.
    Reading needs no lock.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, warning = _acquire(folder)
        try:
            _write_note(descriptor)
            yield warning
        finally:
            with suppress(OSError):
                (folder / FILE).unlink()  # before it is released: the next process makes a new file
            _held.discard(descriptor)
            os.close(descriptor)
    finally:
        with suppress(OSError):
            for place in made:
                place.rmdir()


def _acquire(folder: Path) -> tuple[int, str]:
    path, warning = folder / FILE, ""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        holder = os.read(descriptor, 1000).decode(errors="replace").strip()
        try:
            _lock(descriptor)
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise FolderInUse(
                f"{folder} is in use by {holder or 'another process'}; wait for it or stop it, or choose another folder"
            ) from error
        except OSError:
            warning = f"the file system of {folder} has no locks, so a second process that writes to it is not noticed"
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # its holder removed the file between the two calls
    if holder and not warning and not holder.endswith(_host()):
        warning = f"{folder} was last used by {holder}, which did not end as it should; make sure that it does not run any more"
    _held.add(descriptor)
    return descriptor, warning


def _write_note(descriptor: int) -> None:
    os.truncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')} {_host()}\n".encode())


def _host() -> str:
    return f"on {socket.gethostname()}"


if sys.platform == "win32":

    def _lock(descriptor: int) -> None:
        raise OSError("no locks of whole files that can be read")

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        # Not lockf: its locks are lost when any descriptor of the file is closed, and two threads do not exclude each other.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _close_inherited() -> None:
        """Close the locks in a forked child, which would keep them after a crash of this process."""
        while _held:
            os.close(_held.pop())

    os.register_at_fork(after_in_child=_close_inherited)
