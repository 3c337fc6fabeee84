"""Sharded weights on real processes of torchrun: the same numbers as whole weights, and no process that waits for ever."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from difrl.policies.layout import Layout, find_blocks
from tests.sharded_run import STEPS

ROOT = Path(__file__).parents[2]


def launch(count: int, *module: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a module with its arguments on several processes."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m", *module],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def results(folder: Path, count: int, *cases: str) -> dict[str, Any]:
    done = launch(count, "tests.sharded_run", str(folder / "out.json"), *cases)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    assert found.pop("count") == count
    return found


def compare(found: dict[str, Any]) -> None:
    """Compare sharded with whole weights. Updates move a weight by up to 1e-3; float order alone may turn one that is small."""
    for case, layouts in found.items():
        expected = layouts.pop("none")["rows"]
        assert layouts.keys() == {"weights", "gradients"}
        for shard, one in layouts.items():
            assert len(one["rows"]) == len(expected) == STEPS + 2
            for row, other in zip(one["rows"], expected, strict=True):
                timeless = [{k: v for k, v in r.items() if not k.startswith(("time/", "memory"))} for r in (row, other)]
                assert timeless[0] == pytest.approx(timeless[1], rel=2e-3, abs=2e-5, nan_ok=True), (case, shard)
            assert one["apart"] < 5e-5, (case, shard)


def test_two_sharded_processes_train_what_whole_ones_do(tmp_path: Path) -> None:
    """A text model, whose completions differ in length; and a first-update check that fails on one process ends both."""
    found = results(tmp_path, 2, "text", "first_update")
    errors = found.pop("first_update")
    assert re.match("ProcessError: the first-update check failed on another process", errors[0])
    assert re.match("FirstUpdateError: on the first update", errors[1])
    compare(found)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_every_kind_of_run_may_be_sharded(tmp_path: Path, count: int) -> None:
    """Passes that processes make unequally are among them: redraws, texts, and the experts of Wan 2.2."""
    found = results(
        tmp_path,
        count,
        "full",
        "lora",
        "bfloat16",
        "redraw",
        "sampler",
        "unet",
        "experts",
        "text",
        "text_lora",
        "teacher",
    )
    compare(found)


@pytest.mark.slow
def test_a_failure_of_one_process_ends_all(tmp_path: Path) -> None:
    errors = results(tmp_path, 3, "reward", "first_update")
    for case, expected in (("reward", "RewardError"), ("first_update", "FirstUpdateError")):
        kinds = [error.partition(":")[0] for error in errors[case]]
        assert kinds == ["ProcessError", expected, "ProcessError"], errors[case]


@pytest.mark.slow
def test_a_process_that_dies_in_a_pass_leaves_none_behind(tmp_path: Path) -> None:
    done = launch(2, "tests.sharded_run", str(tmp_path / "out.json"), "crash")
    assert done.returncode != 0
    assert "process 1 leaves" in done.stdout
    assert not (tmp_path / "out.json").exists()


def test_blocks_are_those_that_a_library_never_splits_and_inner_ones_come_first() -> None:
    class Block(nn.Module):
        def __init__(self, *inner: nn.Module) -> None:
            super().__init__()
            self.inner = nn.ModuleList(inner)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = nn.Linear(2, 2), nn.ModuleList([Block(Block()), Block()])

    network = Network()
    assert find_blocks(network) == [network.blocks[1], network.blocks[0]]  # no list of names: members of its lists
    network._no_split_modules = ["Block"]  # type: ignore[assignment]
    outer = network.blocks[0]
    assert isinstance(outer, Block)
    assert find_blocks(network) == [network.blocks[1], outer.inner[0], outer]


def test_a_whole_layout_is_the_identity() -> None:
    weight = nn.Parameter(torch.arange(3.0))
    layout = Layout({"w": weight})
    assert layout.local(weight) is weight
    assert layout.whole("w", weight) is layout.part("w", weight) is weight
    assert (layout.all_agree(True), layout.all_agree(False), layout.largest([2, 0]), layout.is_gathered) == (
        True,
        False,
        [2, 0],
        True,
    )
