"""Writing of checkpoints. All processes gather the tensors, one at a time, and the main process writes them.

It copies them to the memory of the CPU and writes the copy while the next steps run. If the copy would take more than half of
the free memory, each tensor is written when it is gathered, and training waits.

torch.distributed.checkpoint is not used: its asynchronous save also copies all tensors first, whatever the memory, and its
files are of another format, by process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difrl.runtime.distributed import DistributedContext, ProcessError
from difrl.runtime.files import atomic_write_text
from difrl.runtime.memory import available_memory
from difrl.runtime.progress import phase
from difrl.runtime.tensor_file import TensorSpec, write_tensors
from difrl.training.checkpoint import optimizer
from difrl.training.checkpoint.folder import (
    DIGESTS,
    CheckpointError,
    checkpoint_folder,
    find_all,
    parse_step,
    remove,
    remove_partial,
)
from difrl.training.checkpoint.tensors import Entry
from difrl.training.trainer import Trainer
from rewards.random_state import get_random_state


class Writer:
    """The thread of the main process that writes checkpoints, one at a time."""

    def __init__(self, processes: DistributedContext) -> None:
        self.processes = processes
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def start(self, write: Callable[[], None], *, at_once: bool) -> None:
        """Write a checkpoint, on the main process, after `finish`. at_once: before the method returns."""
        if not at_once:
            self._pending = self._thread.submit(write)
            return
        self._pending = Future()
        try:
            write()
            self._pending.set_result(None)
        except CheckpointError as error:
            self._pending.set_exception(error)

    def finish(self) -> None:
        """Wait until the checkpoint is on the disk. Raise an error on all processes, which must call it, if writing failed."""
        pending, self._pending, failure = self._pending, None, None
        try:
            if pending is not None:
                with phase("checkpoint"):
                    pending.result()
        except CheckpointError as error:
            failure = error
        if self.processes.any(failure is not None):
            raise failure or ProcessError(
                "the main process could not write a checkpoint; its message is among the output"
            )

    def close(self) -> str:
        """Wait as `finish` does, after a failure and without the other processes. Return the message of an error, or ""."""
        self._thread.shutdown()
        failure = None if self._pending is None else self._pending.exception()
        return str(failure or "")


def save(
    trainer: Trainer,
    run: Path,
    step: int,
    keep: int,
    processes: DistributedContext,
    spared: Collection[int] = (),
    metrics: Mapping[str, int | str] | None = None,
    writer: Writer | None = None,
) -> None:
    """Write the state after `step` steps. Then remove all but the newest `keep` checkpoints and those of the `spared` steps.

    All processes must call it. Raise CheckpointError if the disk is full or not writable.

    metrics: the step up to which rows of metrics are complete, and the digest of these rows; part of the state.
    writer: finishes an earlier checkpoint, and writes this one while the caller goes on. Errors of writing are raised where
    it is used next. Without it, the checkpoint is on the disk when the function returns.
    """
    own = writer or Writer(processes)
    own.finish()
    files, steps = _list_files(trainer, processes)
    state = {
        "step": step,
        "evaluations": trainer.evaluations,
        "optimizer_steps": steps,
        "coefficients": {name: c.state() for name, c in trainer.coefficients.items() if c.state()},
        "weights": {name: c.state() for name, c in trainer.weights.items() if c.state()},
        "threads": torch.get_num_threads(),
        "processes": processes.count,
        "metrics": metrics,
    }
    entries = [entry for part in files.values() for entry in part]
    fits = processes.all(2 * sum(entry.spec.nbytes for entry in entries) < available_memory() or not processes.is_main)
    tensors = (entry.gather().detach() for entry in entries)
    if processes.is_main:
        specs = {name: [entry.spec for entry in part] for name, part in files.items()}
        if fits:
            copies = deque(tensor.to("cpu", copy=True) for tensor in tensors)
            tensors = (copies.popleft() for _ in entries)  # each is freed when it is written
        own.start(partial(_write_folder, run, step, keep, spared, specs, tensors, state), at_once=not fits)
    else:
        deque(tensors, maxlen=0)
    if writer is None or not fits:
        own.finish()


def _list_files(trainer: Trainer, processes: DistributedContext) -> tuple[dict[str, list[Entry]], int]:
    """Return the tensors of every file in its order, and the number of the optimizer's steps."""
    layout = trainer.policy.snapshots.layout

    def whole(name: str, parameter: str, like: Tensor, part: Tensor) -> Entry:
        return Entry(TensorSpec.of(name, like), lambda: layout.whole(parameter, part.to(like.device)))

    parameters = layout.parameters
    moments, steps = optimizer.list_entries(trainer.optimizer, layout, processes)
    snapshots = trainer.policy.snapshots.state().items()
    files = {
        "trained": [whole(name, name, p, layout.local(p.detach())) for name, p in parameters.items()],
        "optimizer": moments,
        "snapshots": [
            whole(key, name, parameters[name], part) for key, part in snapshots for name in [key.partition("/")[2]]
        ],
        "source": [
            Entry.of(f"{rank}/{name}", part)
            for name, rows in trainer.source.state().items()
            for rank, part in enumerate(processes.gather_ragged(rows.to(processes.device)))
        ],
        "random": [
            Entry.of(name, processes.gather(value[None].to(processes.device)))
            for name, value in get_random_state().items()
        ],
    }
    return {name: sorted(part, key=lambda entry: entry.spec.place) for name, part in files.items()}, steps


def _write_folder(
    run: Path,
    step: int,
    keep: int,
    spared: Collection[int],
    files: Mapping[str, Sequence[TensorSpec]],
    tensors: Iterator[Tensor],
    state: Mapping[str, Any],
) -> None:
    """Write the folder of a checkpoint, from its tensors in the order of the files, and remove older checkpoints."""
    place = checkpoint_folder(run, step)
    aside = place.with_name(f".{place.name}.partial")
    remove_partial(run)
    try:
        aside.mkdir(parents=True)
        digests = {}
        for name, specs in files.items():
            path = aside / f"{name}.safetensors"
            digests[path.name] = write_tensors(path, specs, islice(tensors, len(specs)))
        sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
        text = json.dumps({**state, "files": sizes, "digests": DIGESTS}, indent=2)
        atomic_write_text(aside / "state.json", text)
        digests["state.json"] = hashlib.sha256(text.encode()).hexdigest()
        atomic_write_text(aside / DIGESTS, "".join(f"{digest}  {name}\n" for name, digest in digests.items()))
        remove(place)
        os.replace(aside, place)  # `atomic_write` for a whole folder
        for old in find_all(run)[:-keep]:
            if parse_step(old) not in spared:
                remove(old)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {place}: {error}. Earlier checkpoints are untouched; free some space or fix the permissions "
            "and continue with --resume"
        ) from error
    finally:
        deque(tensors, maxlen=0)  # the other processes gather all of them
