"""Save and load checkpoints: the state from which a run continues as if it had never stopped, in safetensors and JSON.

    step-000050/  trained.safetensors  optimizer.safetensors  snapshots.safetensors  source.safetensors  random.safetensors
                  state.json

A checkpoint is written aside and renamed, so a folder of that name is complete. state.json lists the size of every file, by
which later damage is found. Rollouts draw keyed noise and the order of prompts depends on the step alone, so the step is the
position in the data. The global random states are saved for rewards that use them (random.safetensors, by process). So are the
scores of reference samples, which a reward might not give again (source.safetensors, by process).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from difrl.core import Coefficient
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.errors import UserError
from difrl.runtime.files import atomic_write_text, flush_to_disk
from difrl.training.trainer import Trainer
from rewards.random_state import get_random_state, set_random_state

PREFIX = "step-"
RESULT = "checkpoints/result.json"


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"{PREFIX}{step:06d}"


def find_latest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run folder, if there is one."""
    found = find_all(run)
    return found[-1] if found else None


def find_all(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first. Copies such as step-000050-best are left out."""
    found = [p for p in (run / "checkpoints").glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", p.name)]
    return sorted(found, key=lambda place: int(place.name.removeprefix(PREFIX)))


def parse_step(place: Path | None) -> int:
    """Return the number of steps of a checkpoint, from its name; 0 for None."""
    return 0 if place is None else int(place.name.removeprefix(PREFIX))


def find_result(run: Path) -> Path | None:
    """Return the checkpoint with the result of the run: the newest, or the one that the guard chose."""
    mark = run / RESULT
    return checkpoint_folder(run, int(json.loads(mark.read_text())["step"])) if mark.is_file() else find_latest(run)


def mark_result(run: Path, step: int | None) -> None:
    """Mark the checkpoint of a step as the result; None: the newest, which is the default."""
    if step is None:
        (run / RESULT).unlink(missing_ok=True)
    else:
        atomic_write_text(run / RESULT, json.dumps({"step": step}))


def save(
    trainer: Trainer, run: Path, step: int, keep: int, processes: DistributedContext, spared: Collection[int] = ()
) -> None:
    """Write the state after `step` steps. Then remove all but the newest `keep` checkpoints and those of the `spared` steps.

    All processes must call it. Raise CheckpointError if the disk is full or not writable.
    """
    generators = {
        name: processes.gather(value[None].to(processes.device)).cpu() for name, value in get_random_state().items()
    }
    source = {
        f"{rank}/{name}": part
        for name, rows in trainer.source.state().items()
        for rank, part in enumerate(processes.gather_ragged(rows.to(processes.device)))
    }
    if not processes.is_main:
        return
    place = checkpoint_folder(run, step)
    aside = place.with_name(f".{place.name}.partial")
    for left in place.parent.glob(f".{PREFIX}*.partial"):  # from a process that was killed while writing
        shutil.rmtree(left, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        optimizer, steps = _optimizer_state(trainer)
        _write(aside / "trained.safetensors", {n: p.data for n, p in trainer.policy.parameters.items()})
        _write(aside / "optimizer.safetensors", optimizer)
        _write(aside / "snapshots.safetensors", trainer.policy.snapshots.state())
        _write(aside / "source.safetensors", source)
        _write(aside / "random.safetensors", generators)
        state = {
            "step": step,
            "evaluations": trainer.evaluations,
            "optimizer_steps": steps,
            "coefficients": {name: c.state() for name, c in trainer.coefficients.items() if c.state()},
            "weights": {name: c.state() for name, c in trainer.weights.items() if c.state()},
            "threads": torch.get_num_threads(),
            "processes": processes.count,
            "files": {p.name: p.stat().st_size for p in sorted(aside.iterdir())},
        }
        atomic_write_text(aside / "state.json", json.dumps(state, indent=2))
        if place.exists():
            shutil.rmtree(place)
        os.replace(aside, place)  # `atomic_write` for a whole folder
        for old in find_all(run)[:-keep]:
            if parse_step(old) not in spared:
                shutil.rmtree(old)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error on a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {place}: {error}. Earlier checkpoints are untouched; free some space or fix the permissions "
            "and continue with --resume"
        ) from error


def load(trainer: Trainer, place: Path, processes: DistributedContext) -> int:
    """Load a checkpoint into the trainer. Return the number of its steps."""
    state = read_state(place)
    load_trained(trainer.policy.parameters, place)
    trainer.policy.snapshots.load(_read(place, "snapshots"))
    _load_optimizer(trainer, _read(place, "optimizer"), state["optimizer_steps"])
    trainer.coefficients = _coefficients(trainer.coefficients, state.get("coefficients", {}), place, "anchors")
    trainer.weights = _coefficients(trainer.weights, state.get("weights", {}), place, "rewards")
    _load_source(trainer, place, state, processes)
    trainer.evaluations = state["evaluations"]
    generators = _read(place, "random")
    if state["processes"] == processes.count:
        # Copies, because torch misreads (or crashes on) a state that is a view into a larger tensor.
        set_random_state({name: value[processes.rank].clone() for name, value in generators.items()})
    return int(state["step"])


def read_state(place: Path) -> dict[str, Any]:
    """Read state.json. Raise CheckpointError unless every file is there in its full length."""
    if not place.is_dir():
        existing = ", ".join(p.name for p in find_all(place.parent.parent)) or "none"
        raise CheckpointError(f"there is no checkpoint {place}; the run has {existing}")
    problem = None
    try:
        state: dict[str, Any] = json.loads((place / "state.json").read_text())
        for name, size in state["files"].items():
            found = (place / name).stat().st_size if (place / name).exists() else None
            if found != size:
                problem = (
                    f"{name} has {found} bytes where {size} were written" if found is not None else f"{name} is missing"
                )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"state.json cannot be read ({error})"
    if problem:
        raise _damaged(place, problem)
    return state


def _damaged(place: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {place} is damaged: {problem}. Delete that folder to continue from the one before it"
    )


def _read(place: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(place / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise _damaged(place, f"{name}.safetensors cannot be read ({error})") from error


@torch.no_grad()
def load_trained(parameters: Mapping[str, torch.nn.Parameter], place: Path) -> None:
    """Copy the trained weights of a checkpoint into parameters, whose names and shapes must be the same."""
    saved = _read(place, "trained")
    if saved.keys() != parameters.keys():
        unknown = sorted(saved.keys() ^ parameters.keys())[:3]
        raise CheckpointError(
            f"the checkpoint {place} is of another model: {unknown} are in only one of the two; use the model section "
            "that the run was started with"
        )
    for name, p in parameters.items():
        if p.shape != saved[name].shape:
            raise CheckpointError(
                f"the checkpoint {place} is of another model: {name} has shape {list(saved[name].shape)} there and "
                f"{list(p.shape)} here (another LoRA rank?)"
            )
        p.copy_(saved[name])


def _optimizer_state(trainer: Trainer) -> tuple[dict[str, Tensor], int]:
    tensors, steps = {}, 0
    for name, p in trainer.policy.parameters.items():
        state = trainer.optimizer.state.get(p, {})
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{name}/{key}"] = state.get(key, torch.zeros_like(p))
        steps = int(state.get("step", 0))
    return tensors, steps


def _load_optimizer(trainer: Trainer, tensors: Mapping[str, Tensor], steps: int) -> None:
    if steps == 0:
        return
    for name, p in trainer.policy.parameters.items():
        moments = {key: tensors[f"{name}/{key}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
        trainer.optimizer.state[p] = {"step": torch.tensor(float(steps)), **moments}


def _load_source(trainer: Trainer, place: Path, state: Mapping[str, Any], processes: DistributedContext) -> None:
    """Load the state of the rollout source: each process its own, or all of it if the number of processes has changed.

    A checkpoint of an earlier version has no such file; its measurements are then repeated.
    """
    if "source.safetensors" not in state["files"]:
        return
    saved, count = _read(place, "source"), state["processes"]
    expected = _layout(trainer.source.state())
    for rank in [processes.rank] if count == processes.count else range(count):
        tensors = {name.removeprefix(f"{rank}/"): rows for name, rows in saved.items() if name.startswith(f"{rank}/")}
        if _layout(tensors) != expected:
            raise CheckpointError(
                f"the checkpoint {place} holds for each prompt {', '.join(_layout(tensors)) or 'nothing'} and this run needs "
                f"{', '.join(expected) or 'nothing'}: it was written under other references or rewards. Resume with those the "
                "run was started with, or start a new run"
            )
        trainer.source.load(tensors)


def _layout(state: Mapping[str, Tensor]) -> list[str]:
    """Return the name of each tensor with the shape of a row."""
    return sorted(f"{name} {list(rows.shape[1:])}" for name, rows in state.items())


def _coefficients(
    coefficients: Mapping[str, Coefficient], saved: Mapping[str, Mapping[str, float]], place: Path, section: str
) -> dict[str, Coefficient]:
    """Return the coefficients with the saved state of the adaptive ones. `section`: their section of the recipe."""
    adaptive = {name: c.state().keys() for name, c in coefficients.items() if c.state()}
    found = {name: state.keys() for name, state in saved.items()}
    if adaptive != found:
        raise CheckpointError(
            f"the checkpoint {place} holds the state of the coefficients {sorted(found) or 'none'} and this run adapts "
            f"{sorted(adaptive) or 'none'}: it was written by an earlier version or under other {section}. Resume with the "
            f"{section} the run was started with, or start a new run"
        )
    return {name: c.with_state(saved.get(name, {})) for name, c in coefficients.items()}


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    flush_to_disk(path)
