"""Save and load checkpoints: the state from which a run continues as if it had never stopped, in safetensors and JSON.

    step-000050/  trained.safetensors  optimizer.safetensors  snapshots.safetensors  source.safetensors  random.safetensors
                  state.json  SHA256SUMS

A checkpoint is written aside and renamed, so a folder of that name is complete. Later damage is found by the digests in
SHA256SUMS (`sha256sum -c` reads it too), and in checkpoints of earlier versions by the sizes in state.json. Rollouts draw keyed
noise and the order of prompts depends on the step alone, so the step is the position in the data. The global random states are
saved for rewards that use them (random.safetensors, by process). So are the scores of reference samples, which a reward might
not give again (source.safetensors, by process).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from difrl.core import Coefficient
from difrl.policies.snapshots import CURRENT, Snapshots
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.errors import UserError
from difrl.runtime.files import atomic_write_text, digest_file, flush_to_disk
from difrl.training.trainer import Trainer
from rewards.random_state import get_random_state, set_random_state

PREFIX = "step-"
RESULT = "checkpoints/result.json"
DIGESTS = "SHA256SUMS"
_NAME = re.compile(rf"{PREFIX}\d+")


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint with files that are not as they were written."""

    def __init__(self, place: Path, problem: str) -> None:
        self.place, self.problem = place, problem
        others = ", ".join(p.name for p in find_all(place.parent.parent) if p != place) or "no other"
        super().__init__(
            f"the checkpoint {place} is damaged: {problem}. --resume passes it over; the run has {others} beside it"
        )


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"{PREFIX}{step:06d}"


def find_latest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run folder, if there is one."""
    found = find_all(run)
    return found[-1] if found else None


def find_all(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first. Copies such as step-000050-best are left out."""
    try:
        places = list((run / "checkpoints").iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"cannot read {run / 'checkpoints'}: {error.strerror}; make it readable for this user"
        ) from error
    return sorted((place for place in places if _NAME.fullmatch(place.name)), key=parse_step)


def find_whole(run: Path) -> tuple[Path | None, list[DamagedCheckpoint]]:
    """Return the newest checkpoint without damage, None for a run without checkpoints, and the damaged ones that are newer.

    Raise CheckpointError if none of several is whole, or if one cannot be read.
    """
    damaged: list[DamagedCheckpoint] = []
    for place in reversed(find_all(run)):
        try:
            check(place)
        except DamagedCheckpoint as error:
            damaged.append(error)
        else:
            return place, damaged
    if damaged:
        found = "; ".join(f"{error.place.name}: {error.problem}" for error in damaged)
        raise CheckpointError(
            f"no checkpoint of {run} is whole ({found}); restore the files from a copy, or start a new run with "
            "output_dir=runs/NAME"
        )
    return None, []


def set_aside(place: Path) -> Path:
    """Rename a damaged checkpoint, so that the run does not continue from it and does not remove it. Return its new place."""
    names = (f"{place.name}-damaged" + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
    free = next(place.with_name(name) for name in names if not place.with_name(name).exists())
    return place.rename(free)


def parse_step(place: Path | None) -> int:
    """Return the number of steps of a checkpoint, from its name; 0 for None."""
    return 0 if place is None else int(place.name.removeprefix(PREFIX))


def find_result(run: Path) -> Path | None:
    """Return the checkpoint with the result of the run: the newest, or the one that the guard chose."""
    mark = run / RESULT
    if not mark.is_file():
        return find_latest(run)
    try:
        return checkpoint_folder(run, int(json.loads(mark.read_text())["step"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{mark} cannot be read ({error}); it names the step that the guard chose, and --resume writes it again"
        ) from error


def mark_result(run: Path, step: int | None) -> None:
    """Mark the checkpoint of a step as the result; None: the newest, which is the default."""
    if step is None:
        (run / RESULT).unlink(missing_ok=True)
    else:
        atomic_write_text(run / RESULT, json.dumps({"step": step}))


def save(
    trainer: Trainer,
    run: Path,
    step: int,
    keep: int,
    processes: DistributedContext,
    spared: Collection[int] = (),
    metrics: Mapping[str, int | str] | None = None,
) -> None:
    """Write the state after `step` steps. Then remove all but the newest `keep` checkpoints and those of the `spared` steps.

    metrics: the step up to which rows of metrics are complete, and the digest of these rows; part of the state.

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
    remove_partial(run)
    try:
        aside.mkdir(parents=True)
        optimizer, steps = _optimizer_state(trainer)
        parts = {
            "trained": {n: p.data for n, p in trainer.policy.parameters.items()},
            "optimizer": optimizer,
            "snapshots": trainer.policy.snapshots.state(),
            "source": source,
            "random": generators,
        }
        # A file is digested while the next one is written. It is read from the memory in which the system caches files.
        with ThreadPoolExecutor(1, "digests") as thread:
            digests = {}
            for name, tensors in parts.items():
                path = aside / f"{name}.safetensors"
                _write(path, tensors)
                digests[path.name] = thread.submit(digest_file, path)
            state = {
                "step": step,
                "evaluations": trainer.evaluations,
                "optimizer_steps": steps,
                "coefficients": {name: c.state() for name, c in trainer.coefficients.items() if c.state()},
                "weights": {name: c.state() for name, c in trainer.weights.items() if c.state()},
                "threads": torch.get_num_threads(),
                "processes": processes.count,
                "metrics": metrics,
                "files": {p.name: p.stat().st_size for p in sorted(aside.iterdir())},
                "digests": DIGESTS,
            }
            atomic_write_text(aside / "state.json", json.dumps(state, indent=2))
            digests["state.json"] = thread.submit(digest_file, aside / "state.json")
            lines = [f"{digest.result()}  {name}\n" for name, digest in digests.items()]
        atomic_write_text(aside / DIGESTS, "".join(lines))
        _remove(place)
        os.replace(aside, place)  # `atomic_write` for a whole folder
        for old in find_all(run)[:-keep]:
            if parse_step(old) not in spared:
                _remove(old)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error on a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {place}: {error}. Earlier checkpoints are untouched; free some space or fix the permissions "
            "and continue with --resume"
        ) from error


def remove_partial(run: Path) -> None:
    """Remove what a process left that was killed while it wrote or removed a checkpoint."""
    for left in checkpoint_folder(run, 0).parent.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _remove(place: Path) -> None:
    """Remove a checkpoint. Its name goes first, so that a process that is killed here leaves no damaged one."""
    if place.exists():
        old = place.with_name(f".{place.name}.old.partial")
        os.replace(place, old)
        shutil.rmtree(old)


def load(trainer: Trainer, place: Path, processes: DistributedContext, *, checked: bool = False) -> int:
    """Load a checkpoint into the trainer. Return the number of its steps. Raise DamagedCheckpoint if a file is not as written.

    checked: leave out the digests, which this process or another one has compared.
    """
    state = read_state(place) if checked else check(place)
    load_trained(trainer.policy.parameters, place, checked=True)
    load_snapshots(trainer.policy.snapshots, place)
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
    """Read state.json. Raise DamagedCheckpoint unless it is as written and every file is there in its full length."""
    with _readable(place):
        if not place.is_dir():
            existing = ", ".join(p.name for p in find_all(place.parent.parent)) or "none"
            raise CheckpointError(f"there is no checkpoint {place}; the run has {existing}")
        return _read_state(place)


def check(place: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Return the state of a checkpoint. Raise DamagedCheckpoint if a file is not as written.

    names: the files that are compared with their digests, all by default. Checkpoints of earlier versions have no digests.
    """
    state = read_state(place)
    with _readable(place):
        for name, digest in _read_digests(place).items():
            if (names is None or name in names) and digest_file(place / name) != digest:
                raise DamagedCheckpoint(place, f"{name} is not as it was written (its SHA-256 differs)")
    return state


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    """Raise CheckpointError for a file that is there and that this user may not read: it is no damage."""
    try:
        yield
    except PermissionError as error:
        raise CheckpointError(
            f"cannot read {error.filename or place}: {error.strerror}; make it readable for this user, and continue"
        ) from error
    except OSError as error:
        raise DamagedCheckpoint(place, f"{error.filename or 'a file'} cannot be read ({error})") from error


def _read_state(place: Path) -> dict[str, Any]:
    digests = _read_digests(place)
    if "state.json" in digests and digest_file(place / "state.json") != digests["state.json"]:
        raise DamagedCheckpoint(place, "state.json is not as it was written (its SHA-256 differs)")
    try:
        state: dict[str, Any] = json.loads((place / "state.json").read_text())
        for name, size in state["files"].items():
            if not (place / name).exists():
                raise DamagedCheckpoint(place, f"{name} is missing")
            if (found := (place / name).stat().st_size) != size:
                raise DamagedCheckpoint(place, f"{name} has {found} bytes where {size} were written")
        if _NAME.fullmatch(place.name) and state["step"] != parse_step(place):
            raise DamagedCheckpoint(place, f"state.json is of step {state['step']}")
        if digests.keys() != ({*state["files"], "state.json"} if "digests" in state else set()):
            raise DamagedCheckpoint(place, f"{DIGESTS} does not list the files of the checkpoint")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(place, f"state.json cannot be read ({error})") from error
    return state


def _read_digests(place: Path) -> dict[str, str]:
    """Return the digest of every file, by name; {} without the file of digests, as in a checkpoint of an earlier version."""
    path = place / DIGESTS
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = [line.partition("  ") for line in text.splitlines(keepends=True)]
    return {name.removesuffix("\n"): digest for digest, _, name in lines if name.endswith("\n")}


def _read(place: Path, name: str) -> dict[str, Tensor]:
    try:
        with _readable(place):
            return load_file(place / f"{name}.safetensors")
    except SafetensorError as error:
        raise DamagedCheckpoint(place, f"{name}.safetensors cannot be read ({error})") from error


def load_snapshots(snapshots: Snapshots, place: Path) -> None:
    """Restore the snapshots of a checkpoint."""
    snapshots.load(_read(place, "snapshots"))


@torch.no_grad()
def load_trained(
    parameters: Mapping[str, torch.nn.Parameter], place: Path, *, checked: bool = False, snapshot: str = CURRENT
) -> None:
    """Copy the trained weights of a checkpoint into parameters, whose names and shapes must be the same.

    checked: leave out the comparison of the file with its digest.
    snapshot: name of the snapshot whose weights are taken, or current.
    """
    name = "trained" if snapshot == CURRENT else "snapshots"
    if not checked:
        check(place, [f"{name}.safetensors"])
    saved = _read(place, name)
    if snapshot != CURRENT:
        saved = {key.removeprefix(f"{snapshot}/"): x for key, x in saved.items() if key.startswith(f"{snapshot}/")}
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
