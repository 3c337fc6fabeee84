"""Runs in processes of their own, which meet a fault at any event. They are forked from a server that has imported everything.

An event is an fsync, a backward pass, or a call that opens, makes, renames or removes a file in the run folder.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from difrl.config import RunConfig
from difrl.config.load import read_config, to_yaml
from difrl.reporting.terminal import SilentDisplay
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.errors import UserError
from difrl.training import run as running
from tests.training.test_run import results

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def start(
    config: RunConfig, *, resume: bool = False, processes: int = 1, at: Sequence[int] = (), number: int = 0
) -> list[int]:
    """Run a recipe, and return the exit codes of its processes, negative ones for signals.

    at: the events of the first process at which it sends the signal `number` to itself; a SIGKILL takes the others with it.
    With number = 0 the disk is full from the first of these events on.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.reliability.runs"])
    path = config.output_dir.with_suffix(".yaml")
    path.write_text(to_yaml(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        server.Process(target=_work, args=(path, resume, rank, processes, port, at if rank == 0 else (), number))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    workers[0].join()
    for worker in workers[1:]:
        if workers[0].exitcode == -signal.SIGKILL:
            worker.kill()
        worker.join()
    return [worker.exitcode for worker in workers if worker.exitcode is not None]


def count_events(config: RunConfig, processes: int = 1) -> int:
    """Run a recipe, and return the number of events of its first process."""
    assert set(start(config, processes=processes, at=[sys.maxsize])) == {0}
    return int(config.output_dir.with_suffix(".events").read_text())


def model_files(run: Path) -> Mapping[str, bytes]:
    """Return the files of the saved model."""
    return {str(path.relative_to(run)): path.read_bytes() for path in (run / "model").rglob("*") if path.is_file()}


def outcome(run: Path) -> dict[str, Any]:
    """Return all that a resumed run must have in common with one that was never interrupted."""
    return {**results(run), **model_files(run)}


def _work(path: Path, resume: bool, rank: int, count: int, port: int, at: Sequence[int], number: int) -> None:
    """Train, as one process of `count`."""
    torch.set_num_threads(1)
    if count > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in place.items()} | {"ACCELERATE_USE_CPU": "true"}
    config, processes = read_config(path), DistributedContext()
    fault = Fault(config.output_dir, at, number)
    if at:
        fault.watch()
    try:
        running.train(config, resume=resume, display=SilentDisplay(), processes=processes)
    except UserError as error:
        path.with_suffix(".error").write_text(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException:
        path.with_suffix(".error").write_text(traceback.format_exc())
        raise
    finally:
        fault.at = ()
        if rank == 0:
            path.with_suffix(".events").write_text(str(fault.events))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class Fault:
    """A fault of this process at some of its events."""

    def __init__(self, folder: Path, at: Sequence[int], number: int) -> None:
        self.folder, self.at, self.number, self.events = str(folder), at, number, 0

    def watch(self) -> None:
        """Begin to count events. Python cannot end this."""
        fsync, backward = os.fsync, torch.Tensor.backward

        def counted_fsync(descriptor: int) -> None:
            self.event(writes=True)
            fsync(descriptor)

        def counted_backward(*args: Any, **named: Any) -> None:
            self.event(writes=False)
            backward(*args, **named)

        os.fsync, torch.Tensor.backward = counted_fsync, counted_backward  # type: ignore[assignment,method-assign]
        sys.addaudithook(self.audited)

    def audited(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Count the calls that concern the folder."""
        if name in FILE_EVENTS and (str(arguments[0]) + os.sep).startswith(self.folder + os.sep):
            opens = name == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
            self.event(writes=opens or name == "os.mkdir")

    def event(self, *, writes: bool) -> None:
        """Count an event, and let the fault happen if it is its turn."""
        self.events += 1
        if self.number and self.events in self.at:
            os.kill(os.getpid(), self.number)
        if not self.number and writes and self.at and self.events >= self.at[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
