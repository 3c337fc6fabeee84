"""Checkpoints of weights that are sharded over two processes: one format, whatever the layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from difrl.runtime.distributed import DistributedContext
from difrl.training import checkpoint
from tests.sharded_checkpoint import NAMES, STEPS, build, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two processes and of one, each resumed by the other too."""
    pytest.importorskip("torchao")
    folder, processes = tmp_path_factory.mktemp("sharded"), DistributedContext()
    for name in NAMES:
        train(build(name, 0, "none"), folder / name / "whole", 0, processes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "-m", "tests.sharded_checkpoint", str(folder)],
        capture_output=True, text=True, check=False, timeout=300, cwd=root, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in NAMES:
        resumed = build(name, 1, "none")
        checkpoint.load(resumed, checkpoint.checkpoint_folder(folder / name / "sharded", STEPS[0]), processes)
        train(resumed, folder / name / "one process", STEPS[0], processes)
    return folder


def files(run: Path, step: int = STEPS[-1]) -> dict[str, bytes]:
    place = checkpoint.checkpoint_folder(run, step)
    checkpoint.check(place)
    return {path.name: path.read_bytes() for path in place.glob("*.safetensors")}


def weights(run: Path) -> torch.Tensor:
    place = checkpoint.checkpoint_folder(run, STEPS[-1])
    found = {**load_file(place / "trained.safetensors"), **load_file(place / "snapshots.safetensors")}
    return torch.cat([found[name].flatten() for name in sorted(found)])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_resumed_in_the_same_layout_is_the_same_run(folder: Path, name: str) -> None:
    assert files(folder / name / "sharded resumed") == files(folder / name / "sharded")


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_the_files_are_those_of_one_process(folder: Path, step: int) -> None:
    """The updates of AdamW are those of each weight by itself, so every bit is the same. Random states are by process."""
    one, two = files(folder / "AdamW" / "whole", step), files(folder / "AdamW" / "sharded", step)
    del one["random.safetensors"], two["random.safetensors"]
    del one["source.safetensors"], two["source.safetensors"]
    assert one == two


@pytest.mark.slow
@pytest.mark.parametrize("other", ["one process", "gradients resumed", "none resumed", "whole resumed"])
@pytest.mark.parametrize("name", NAMES)
def test_another_layout_goes_on_to_float_error(folder: Path, name: str, other: str) -> None:
    """Moments in few bits are rounded again: their error is a share of the two steps of 0.01, a large one in 4 bits."""
    expected, found = (weights(folder / name / run) for run in ("whole", other))
    error = float((found - expected).abs().max())
    assert error <= {"AdamW": 0, "torchao AdamW4bit": 2e-3}.get(name, 5e-4)
