"""`torchrun -m tests.sharded_checkpoint FOLDER`: checkpoints of a small sharded model under several optimizers.

Beside it lie those of one process (FOLDER/NAME/whole/…), which tests/training/test_sharded_checkpoint.py writes and compares.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from difrl.config import ModelConfig
from difrl.core import Constant
from difrl.policies.layout import Layout, build_layout
from difrl.policies.snapshots import Snapshots
from difrl.runtime.distributed import DistributedContext
from difrl.training import checkpoint
from tests.training.test_checkpoint import Noted
from tests.training.test_optimizer_state import OPTIMIZERS

NAMES = ("AdamW", "torchao AdamW8bit", "torchao AdamW4bit", "torchao AdamWFp8")
STEPS = (3, 5)
"""Steps after which a checkpoint is written."""


class Network(nn.Module):
    """Layers of which two processes have equal parts, unequal parts, and parts that are too small for blocks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Linear(128, 96), nn.Linear(64, 129), nn.Linear(7, 5)])
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x


def build(name: str, seed: int, shard: str) -> Any:
    """Return the parts of a trainer of the network."""
    layout: Layout = build_layout(Network(seed), ModelConfig(path="nowhere", train="full", shard=shard), "cpu")
    snapshots = Snapshots(layout, {"ema": Constant(0.9)}, nullcontext)
    policy = SimpleNamespace(parameters=layout.parameters, snapshots=snapshots)
    optimizer = OPTIMIZERS[name](list(layout.parameters.values()))
    return SimpleNamespace(
        policy=policy, source=Noted(), optimizer=optimizer, evaluations=0, coefficients={}, weights={}
    )


def advance(trained: Any, start: int, stop: int) -> None:
    """Step along a gradient that depends on each weight alone."""
    for step in range(start, stop):
        for p in trained.policy.parameters.values():
            p.grad = (p.detach() ** 2 - 0.1 * step).detach()
        trained.optimizer.step()
        trained.policy.snapshots.update(step)


def train(trained: Any, folder: Path, start: int, processes: DistributedContext) -> None:
    """Train to the last step, and write the checkpoints on the way."""
    for stop in STEPS:
        if stop > start:
            advance(trained, start, stop)
            checkpoint.save(trained, folder, stop, 9, processes)
            start = stop


def main(folder: Path) -> None:
    """Train sharded; resume that; and resume what one process wrote."""
    processes = DistributedContext()
    assert processes.count == 2
    for name in NAMES:
        place, middle = folder / name, STEPS[0]
        train(build(name, 0, "weights"), place / "sharded", 0, processes)
        for source, target, shard in (
            ("sharded", "sharded resumed", "weights"),
            ("sharded", "gradients resumed", "gradients"),
            ("sharded", "none resumed", "none"),
            ("whole", "whole resumed", "weights"),
        ):
            resumed = build(name, 1, shard)
            checkpoint.load(resumed, checkpoint.checkpoint_folder(place / source, middle), processes)
            train(resumed, place / target, middle, processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
