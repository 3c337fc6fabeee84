"""The folder of a run: its config.yaml, and the checks before a run starts in it or resumes."""

from __future__ import annotations

from collections.abc import Mapping
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
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.errors import UserError
from difrl.runtime.files import atomic_write_text
from difrl.training import checkpoint

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
    "model": {"copies", "embeddings_mb"},
}
"""Keys that a resumed run may change."""


class RunFolderError(UserError):
    """A run folder in which the run cannot start or resume."""


def find_checkpoint_to_resume(config: RunConfig, resume: bool, processes: DistributedContext) -> Path | None:
    """Return the checkpoint to resume from, None for a new run. Raise RunFolderError if the folder holds another run."""
    folder = config.output_dir
    path = folder / "config.yaml"
    if path.exists():
        if not resume:
            raise RunFolderError(
                f"{folder} holds a run already; continue it with --resume, or choose another place with "
                "output_dir=runs/NAME"
            )
        _check_same(read_config(path), config, path)
    place = checkpoint.find_latest(folder) if resume else None
    seen = processes.gather(torch.tensor([checkpoint.parse_step(place)], device=processes.device)).tolist()
    if len(set(seen)) > 1:
        raise RunFolderError(
            f"processes see different checkpoints in {folder} (after steps {seen}); put the run folder on a disk that all "
            "machines share"
        )
    return place


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


def prepare_folder(config: RunConfig, processes: DistributedContext) -> None:
    """Make the run folder and its config.yaml. Called after the model is loaded, so that a misspelt model leaves no folder."""
    path = config.output_dir / "config.yaml"
    processes.wait()  # until every process has looked for a checkpoint
    if processes.is_main:
        (config.output_dir / "samples").mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, to_yaml(config))
    processes.wait()


def _check_same(before: RunConfig, now: RunConfig, path: Path) -> None:
    one, two = (c.model_dump(exclude=FREE) for c in (before, now))
    different = sorted(key for key in one if one[key] != two[key])
    if different:
        raise RunFolderError(
            f"{path} was made with other settings of {', '.join(different)}; resume with the recipe it was started with, "
            "or start a new run with output_dir=runs/NAME"
        )
