"""Reading of checkpoints. The main process reads, one tensor at a time, and every process receives its part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difrl.core import Coefficient
from difrl.policies.layout import Layout
from difrl.policies.snapshots import CURRENT, Snapshots
from difrl.runtime.distributed import DistributedContext
from difrl.training.checkpoint import optimizer
from difrl.training.checkpoint.folder import CheckpointError, check, read_state
from difrl.training.checkpoint.tensors import TensorFile
from difrl.training.trainer import Trainer
from rewards.random_state import set_random_state


def load(trainer: Trainer, place: Path, processes: DistributedContext, *, checked: bool = False) -> int:
    """Load a checkpoint into the trainer. Return the number of its steps. Raise DamagedCheckpoint if a file is not as written.

    All processes must call it. checked: leave out the digests, which this process or another one has compared.
    """
    state = processes.from_main(lambda: read_state(place) if checked else check(place))
    layout, steps = trainer.policy.snapshots.layout, state["optimizer_steps"]
    optimizer.load(trainer.optimizer, layout, TensorFile(place, "optimizer", processes), steps, processes)
    load_trained(layout, place, processes, checked=True)
    load_snapshots(trainer.policy.snapshots, place, processes)
    trainer.coefficients = _coefficients(trainer.coefficients, state.get("coefficients", {}), place, "anchors")
    trainer.weights = _coefficients(trainer.weights, state.get("weights", {}), place, "rewards")
    _load_source(trainer, place, state, processes)
    trainer.evaluations = state["evaluations"]
    file = TensorFile(place, "random", processes)
    generators = {name: file.receive(name) for name in file.specs}
    if state["processes"] == processes.count:
        # Copies, because torch misreads (or crashes on) a state that is a view into a larger tensor.
        set_random_state({name: value[processes.rank].cpu().clone() for name, value in generators.items()})
    return int(state["step"])


@torch.no_grad()
def load_snapshots(snapshots: Snapshots, place: Path, processes: DistributedContext) -> None:
    """Restore the snapshots of a checkpoint. All processes must call it."""
    file, copies = TensorFile(place, "snapshots", processes), snapshots.state()
    if missing := sorted(copies.keys() ^ file.specs.keys())[:3]:
        raise CheckpointError(
            f"the snapshots of the checkpoint {place} are not those of this run: {missing} are in only one of the two; resume "
            "with the snapshots section that the run was started with"
        )
    for key, part in copies.items():
        part.copy_(snapshots.layout.part(key.partition("/")[2], file.read(key)))


@torch.no_grad()
def load_trained(
    layout: Layout, place: Path, processes: DistributedContext, *, checked: bool = False, snapshot: str = CURRENT
) -> None:
    """Copy the trained weights of a checkpoint into the parameters of a layout, whose names and shapes must be the same.

    All processes must call it. checked: leave out the comparison of the file with its digest.
    snapshot: name of the snapshot whose weights are taken, or current.
    """
    name, prefix = ("trained", "") if snapshot == CURRENT else ("snapshots", f"{snapshot}/")
    if not checked:
        processes.on_main(lambda: check(place, [f"{name}.safetensors"]))
    file = TensorFile(place, name, processes)
    shapes = {n.removeprefix(prefix): spec.shape for n, spec in file.specs.items() if n.startswith(prefix)}
    if unknown := sorted(shapes.keys() ^ layout.parameters.keys())[:3]:
        raise CheckpointError(
            f"the checkpoint {place} is of another model: {unknown} are in only one of the two; use the model section "
            "that the run was started with"
        )
    for name, p in layout.parameters.items():
        if tuple(p.shape) != shapes[name]:
            raise CheckpointError(
                f"the checkpoint {place} is of another model: {name} has shape {list(shapes[name])} there and "
                f"{list(p.shape)} here (another LoRA rank?)"
            )
    for name, part in layout.active().items():
        part.copy_(layout.part(name, file.read(prefix + name)))


def _load_source(trainer: Trainer, place: Path, state: Mapping[str, Any], processes: DistributedContext) -> None:
    """Load the state of the rollout source: each process its own, or all of it if the number of processes has changed.

    A checkpoint of an earlier version has no such file; its measurements are then repeated.
    """
    if "source.safetensors" not in state["files"]:
        return
    file, count = TensorFile(place, "source", processes), state["processes"]
    saved = {name: file.receive(name).cpu() for name in file.specs}
    expected = _describe(trainer.source.state())
    for rank in [processes.rank] if count == processes.count else range(count):
        tensors = {name.removeprefix(f"{rank}/"): rows for name, rows in saved.items() if name.startswith(f"{rank}/")}
        if _describe(tensors) != expected:
            raise CheckpointError(
                f"the checkpoint {place} holds for each prompt {', '.join(_describe(tensors)) or 'nothing'} and this run needs "
                f"{', '.join(expected) or 'nothing'}: it was written under other references or rewards. Resume with those the "
                "run was started with, or start a new run"
            )
        trainer.source.load(tensors)


def _describe(state: Mapping[str, Tensor]) -> list[str]:
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
