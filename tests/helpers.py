"""Small functions that several tests use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewards import Scores

if TYPE_CHECKING:
    from difrl.training.trainer import Trainer


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "rows.jsonl") -> Path:
    """Write a .jsonl file, and return its path."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scores(values: Any, invalid: Sequence[int | tuple[int, ...]] = ()) -> Scores:
    """Return float64 scores, in which NaN marks invalid rows."""
    found = torch.tensor(values, dtype=torch.float64)
    valid = torch.ones(found.shape, dtype=torch.bool)
    for place in invalid:
        found[place], valid[place] = torch.nan, False
    return Scores(found, valid)


def perturb(parameters: Mapping[str, nn.Parameter], size: float = 0.05, seed: int = 0) -> None:
    """Move trained weights away from their start, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(size * torch.randn(p.shape, generator=generator).to(p.device))


def first_gradient(trainer: Trainer) -> Tensor:
    """Return the gradient of the first step, flattened."""
    trainer.step(0)
    return torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])


def without_times(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that a repeated run has too."""
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def draw_from_snapshot(policy: Any, settings: str, snapshot: str) -> None:
    """Let a snapshot draw the samples without a record of its weights. `settings`: the attribute that has the snapshot."""
    inner = policy.rollout

    def drawn(*args: Any) -> Any:
        truth = getattr(policy, settings)
        setattr(policy, settings, replace(truth, snapshot=snapshot))
        try:
            found = inner(*args)
        finally:
            setattr(policy, settings, truth)
        return replace(found, replay_data={k: v for k, v in found.replay_data.items() if k != "weights"})

    policy.rollout = drawn


def forget_state(checkpoint: Path, key: str) -> None:
    """Give a checkpoint the form that an earlier version wrote: without a key of its state, and without digests."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state[key], state["digests"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "SHA256SUMS").unlink()
