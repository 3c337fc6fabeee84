"""The folder of a run: its config.yaml, and the checks before a run starts in it or resumes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from difrl.config import (
    CosineSchedule,
    DecaySnapshot,
    LinearSchedule,
    ProgressiveWindow,
    RewardAdaptiveCoefficient,
    RunConfig,
)
from difrl.config.load import read_config, to_yaml
from difrl.config.schema.base import PathContext
from difrl.config.yaml_source import ConfigError
from difrl.reporting.metrics_file import read_metrics
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.errors import UserError
from difrl.runtime.files import atomic_write_text
from difrl.runtime.lock import FolderInUse, lock_folder
from difrl.training import checkpoint
from difrl.training.checkpoint import DamagedCheckpoint
from difrl.training.input_digests import digest_inputs, find_changes, read_inputs, write_inputs
from difrl.training.sample_outputs import sample_files

FREE: Mapping[str, Any] = {
    "output_dir": True,
    "eval": True,
    "checkpoint": True,
    "trackers": True,
    "tensorboard": True,
    "guard": True,
    # More steps extend a run; the others change what is computed to float order only.
    "train": {"steps", "threads", "micro_batch"},
    "rollout": {"batch"},
    "model": {"copies", "shard", "embeddings_mb"},
}
"""Keys that a resumed run may change."""


class RunFolderError(UserError):
    """A run folder in which the run cannot start or resume."""


@contextmanager
def lock_run(folder: Path, processes: DistributedContext) -> Iterator[str]:
    """Hold the lock on a run folder, on the main process. Yield a warning about it, or "".

    Raise an error on every process if another run holds it, or if the folder cannot be made.
    """
    with ExitStack() as stack:
        yield processes.on_main(lambda: _enter_lock(folder, stack)) or ""


def _enter_lock(folder: Path, stack: ExitStack) -> str:
    try:
        return stack.enter_context(lock_folder(folder))
    except FolderInUse as error:
        raise RunFolderError(
            f"{error} with output_dir=runs/NAME. `difrl report` and `difrl sample` can read it"
        ) from error
    except OSError as error:
        raise RunFolderError(
            f"cannot write to {folder}: {error}; fix it, or choose another place with output_dir"
        ) from error


@dataclass(frozen=True)
class Start:
    """The start of a run in its folder: from a checkpoint, or from its first step."""

    checkpoint: Path | None
    """Checkpoint to resume from; None: the run starts from its first step."""
    takes_over: bool = False
    """Whether the folder holds an earlier run that did not finish a step."""
    damaged: Sequence[DamagedCheckpoint] = ()
    """Newer checkpoints than this one, which are damaged."""
    begun: bool = False
    """Whether the folder holds finished steps."""

    @property
    def messages(self) -> list[str]:
        """Messages about a start that is not an ordinary one."""
        if self.takes_over:
            return ["an earlier run in this folder ended before its first step; its folder is taken over"]
        if self.checkpoint is None:
            return (
                ["the run has finished steps and no checkpoint, so it starts from its first step"] if self.begun else []
            )
        used = f"the run continues from {self.checkpoint.name}, and the damaged one is kept beside it as …-damaged"
        found = [f"the checkpoint {error.place} is damaged: {error.problem}; {used}" for error in self.damaged]
        if "digests" not in checkpoint.read_state(self.checkpoint):
            found.append(
                f"{self.checkpoint} was written by an earlier version, without digests: only the sizes of its files are checked"
            )
        return found


def find_start(config: RunConfig, resume: bool, processes: DistributedContext) -> Start:
    """Return the checkpoint to resume from, or a start from the first step. Raise RunFolderError if the folder holds another run.

    The main process decides, and compares the digests of the checkpoint for all.
    """
    folder = config.output_dir
    latest = torch.tensor([checkpoint.parse_step(checkpoint.find_latest(folder))], device=processes.device)
    seen = processes.gather(latest).tolist()
    if len(set(seen)) > 1:
        raise RunFolderError(
            f"processes see different checkpoints in {folder} (after steps {seen}); put the run folder on a disk that all "
            "machines share"
        )
    start = processes.on_main(lambda: _find_start(config, resume)) or Start(None)
    found = -1 if start.checkpoint is None else checkpoint.parse_step(start.checkpoint)
    step = int(processes.sum(torch.tensor(found if processes.is_main else 0, device=processes.device)))
    return start if processes.is_main or step < 0 else Start(checkpoint.checkpoint_folder(folder, step))


def _find_start(config: RunConfig, resume: bool) -> Start:
    """Return the start of a run. One that did not finish a step does not occupy its folder."""
    folder = config.output_dir
    path = folder / "config.yaml"
    begun = _has_finished_step(folder)
    if not path.exists():
        if begun:
            raise RunFolderError(
                f"{folder} holds a run whose config.yaml is missing; restore it (`difrl train RECIPE --print-config` prints "
                "one), or choose another place with output_dir=runs/NAME"
            )
        return Start(None)
    begun = begun or not _is_written_by_difrl(path)
    if begun and not resume:
        raise RunFolderError(
            f"{folder} holds a run already; continue it with --resume, or choose another place with "
            "output_dir=runs/NAME"
        )
    different = _find_differences(read_config(path), config) if resume else []
    if begun and different:
        raise RunFolderError(
            f"{path} was made with other settings of {', '.join(different)}; resume with the recipe it was started with, "
            "or start a new run with output_dir=runs/NAME"
        )
    if different or not resume:
        return Start(None, takes_over=True)
    place, damaged = checkpoint.find_whole(folder)
    return Start(place, damaged=damaged, begun=begun)


def _is_written_by_difrl(path: Path) -> bool:
    """Return whether a config.yaml is that of a run. A recipe of the user's own is shorter, or has comments."""
    try:
        return path.read_text(encoding="utf-8") == to_yaml(read_config(path))
    except (OSError, ConfigError, UnicodeDecodeError):
        return False


def _has_finished_step(folder: Path) -> bool:
    saved = [checkpoint.parse_step(place) for place in checkpoint.find_all(folder)]
    return any(step > 0 for step in [*saved, *(row["step"] for row in read_metrics(folder))])


def find_stretched_schedules(before: RunConfig, now: RunConfig) -> list[str]:
    """Return the keys of schedules that span the whole run, if a resumed run has another number of steps."""
    if before.train.steps == now.train.steps:
        return []
    schedules: dict[str, object] = {
        "train.lr": now.train.lr,
        **{f"anchors.{i}.coefficient": anchor.coefficient for i, anchor in enumerate(now.anchors)},
        **{f"rewards.{i}.weight": reward.weight for i, reward in enumerate(now.rewards)},
        **{f"snapshots.{name}": snapshot for name, snapshot in now.snapshots.items()},
        "rollout.window": now.rollout.window,
    }
    return [key for key, schedule in schedules.items() if _spans_the_run(schedule)]


def _spans_the_run(schedule: object) -> bool:
    match schedule:
        case LinearSchedule(steps=None) | CosineSchedule(steps=None) | ProgressiveWindow(over=None):
            return True
        case RewardAdaptiveCoefficient(value=inner) | DecaySnapshot(decay=inner):
            return _spans_the_run(inner)
        case _:
            return False


def prepare_folder(
    config: RunConfig, start: Start, processes: DistributedContext, images: Mapping[str, Sequence[Path]]
) -> list[str]:
    """Make the run folder and its config.yaml. Return the files that a resumed run reads and that have changed since.

    images: the image files that rows of the recipe's files name, by key (`Inputs.images`).

    Called after the model is loaded, so that a misspelt model changes nothing.
    """
    changed: list[str] = []
    folder = config.output_dir
    processes.wait()  # until every process has read its checkpoint
    if processes.is_main:
        checkpoint.remove_partial(folder)
        for damaged in start.damaged:
            checkpoint.set_aside(damaged.place)
        if start.takes_over:
            shutil.rmtree(checkpoint.checkpoint_folder(folder, 0), ignore_errors=True)
            for old in sample_files(folder, 0):
                old.unlink()
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        inputs = digest_inputs(config, images)
        if start.checkpoint is not None:
            changed = find_changes(read_inputs(folder), inputs)
        write_inputs(folder, inputs)
        atomic_write_text(folder / "config.yaml", to_yaml(config, PathContext()))
    processes.wait()
    return changed


def _get_settings(config: RunConfig, paths: PathContext) -> dict[str, Any]:
    """Return the settings that a resumed run may not change. An adapter that it started from has a rank of its own."""
    settings = config.model_dump(exclude=FREE, context=paths)
    if config.model.lora.warm_start is not None:
        del settings["model"]["lora"]["rank"]
    return settings


def _find_differences(before: RunConfig, now: RunConfig) -> list[str]:
    """Return the sections that differ and that a resumed run may not change.

    Paths are the same if they lead to the same place, or, in a project that was moved, to the same place beside the run folder.
    """
    one, two = (_get_settings(config, PathContext()) for config in (before, now))
    near, moved = (_get_settings(config, PathContext(config.output_dir)) for config in (before, now))
    return sorted(key for key in one if one[key] != two[key] and near[key] != moved[key])
