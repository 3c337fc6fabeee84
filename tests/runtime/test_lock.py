"""The lock on a folder: one process at a time, free again however its process ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from difrl.runtime import lock
from difrl.runtime.lock import FolderInUse, lock_folder

HOLD = """
import os, sys, time
from pathlib import Path
from difrl.runtime.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    if sys.argv[2] == "alone" or os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path, how: str = "alone") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield a process that holds the lock, and the pid of its forked child."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        process.kill()
        process.wait()
        if how == "fork":
            os.kill(child, signal.SIGKILL)


def test_a_second_process_is_refused_and_learns_who_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        for _ in range(2):  # a refusal does not release the lock
            with pytest.raises(
                FolderInUse, match=rf"in use by process {process.pid} since .* on {os.uname().nodename}"
            ):
                lock_folder(tmp_path).__enter__()


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_crash_releases_it(tmp_path: Path, how: str) -> None:
    """Even if a forked child, which inherits all descriptors, lives on."""
    with holder(tmp_path, how) as (process, _):
        process.kill()
        process.wait()
        with lock_folder(tmp_path) as warning:
            assert warning == ""
    assert list(tmp_path.iterdir()) == []


def test_one_process_cannot_take_it_twice(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} since"), lock_folder(tmp_path):
            pass
        with pytest.raises(FolderInUse), lock_folder(tmp_path):
            pass
    with lock_folder(tmp_path):
        pass


def test_folders_that_stay_empty_are_removed_if_they_were_made_here(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    own = tmp_path / "own"
    own.mkdir()
    with pytest.raises(KeyError), lock_folder(own):
        raise KeyError
    assert list(own.iterdir()) == []
    with lock_folder(tmp_path / "full"):
        (tmp_path / "full" / "result").touch()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["result"]


COUNT = """
import sys
from pathlib import Path
from difrl.runtime.lock import FolderInUse, lock_folder
folder, taken = Path(sys.argv[1]), 0
while taken < 50:
    try:
        with lock_folder(folder):
            path = folder / "count"
            count = int(path.read_text() or 0) if path.exists() else 0
            path.write_text(str(count + 1))
        taken += 1
    except FolderInUse:
        pass
"""


def test_processes_that_compete_never_hold_it_together(tmp_path: Path) -> None:
    """Each adds 1 fifty times under the lock. No addition is lost, although every release removes the file."""
    command = [sys.executable, "-c", COUNT, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "150"


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", unsupported)
    with lock_folder(tmp_path) as warning:
        assert "has no locks" in warning


def test_a_full_disk_does_not_keep_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note about the holder does not fit."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(lock, "_write_note", full)
        with pytest.raises(OSError, match="No space"), lock_folder(tmp_path):
            pass
    with lock_folder(tmp_path) as warning:
        assert warning == ""


def test_a_holder_on_another_machine_that_did_not_end_is_named(tmp_path: Path) -> None:
    """Some network file systems keep locks to one machine."""
    (tmp_path / lock.FILE).write_text("process 7 since 2026-01-01 00:00:00 on elsewhere\n")
    with lock_folder(tmp_path) as warning:
        assert "last used by process 7 since 2026-01-01 00:00:00 on elsewhere, which did not end" in warning


def test_it_can_be_imported_where_there_are_no_locks(tmp_path: Path) -> None:
    """As on Windows, which has no fcntl."""
    code = (
        "import pathlib, sys; sys.platform, sys.modules['fcntl'] = 'win32', None; import difrl.runtime.lock as lock; "
    )
    code += "print(lock.lock_folder(pathlib.Path(sys.argv[1])).__enter__())"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "has no locks" in done.stdout
