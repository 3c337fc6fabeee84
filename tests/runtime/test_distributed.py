"""Communication between processes: of one process, and in the slow tests of two real processes of torchrun."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from difrl.config.load import to_yaml
from difrl.reporting.metrics_file import read_metrics
from difrl.runtime.distributed import DistributedContext
from tests.fakes import in_threads
from tests.helpers import without_times
from tests.recipes import AWM, FLOW_GRPO, recipe

ROOT = Path(__file__).parents[2]
STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "awm": {**AWM, "snapshots": {"ema": {"decay": 0.5}}, "anchors": [{"to": "ema", "coefficient": 0.5}]},
    "flow_grpo": {
        **FLOW_GRPO,
        "anchors": [{"to": "base", "divergence": "gaussian", "coefficient": 0.1}],
        "train": {"updates_per_step": 2},
    },
}


def test_alone_everything_is_ones_own() -> None:
    processes = DistributedContext()
    assert (processes.count, processes.rank, processes.is_main) == (1, 0, True)
    rows = torch.arange(3)
    assert processes.gather(rows).tolist() == processes.local_rows(rows).tolist() == [0, 1, 2]
    assert processes.all_reduce_sums({"a": torch.tensor(2), "b": torch.tensor(0.5)}) == {"a": 2.0, "b": 0.5}
    assert processes.all_reduce_sums({}) == {}
    assert (processes.all(True), processes.all(False), processes.any(True), processes.any(False)) == (
        True,
        False,
        True,
        False,
    )


def test_means_are_over_what_is_a_number() -> None:
    columns = {"a": torch.tensor([1.0, math.nan, 4.0]), "b": torch.tensor([math.nan]), "c": torch.zeros(0)}
    assert DistributedContext().masked_means(columns) == pytest.approx(
        {"a": 2.5, "b": math.nan, "c": math.nan}, nan_ok=True
    )

    def two(processes: DistributedContext) -> dict[str, float]:
        return processes.masked_means({"a": torch.tensor([[1.0, math.nan, 4.0], [7.0]][processes.rank])})

    assert in_threads(2, two) == [{"a": 4.0}] * 2  # of three numbers, wherever they are


def test_a_flag_of_one_process_is_known_to_all() -> None:
    flags = in_threads(2, lambda p: (p.any(p.rank == 1), p.all(p.rank == 1), p.any(False), p.all(True)))
    assert flags == [(True, False, False, True)] * 2


def test_processes_may_give_different_numbers_of_rows() -> None:
    """Rows of any shape; the number may be 0 on one process or on all."""

    def work(processes: DistributedContext) -> list[list[list[int]]]:
        mine = torch.arange(4).reshape(2, 2) + 10 * processes.rank
        return [
            [part.tolist() for part in processes.gather_ragged(mine[:rows])]
            for rows in (processes.rank + 1, 2 - processes.rank, 0)
        ]

    first = [[[0, 1]], [[10, 11], [12, 13]]]
    second = [[[0, 1], [2, 3]], [[10, 11]]]
    assert in_threads(2, work) == [[first, second, [[], []]]] * 2
    assert DistributedContext().gather_ragged(torch.tensor([1.5, 2.5]))[0].tolist() == [1.5, 2.5]
    assert DistributedContext().gather_ragged(torch.zeros(0, 3))[0].shape == (0, 3)


def test_gradients_are_summed_and_absent_ones_are_zero() -> None:
    def work(processes: DistributedContext) -> list[list[float]]:
        parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))]
        parameters[0].grad = torch.tensor([1.0, 2.0]) * (processes.rank + 1)
        if processes.rank == 1:
            parameters[1].grad = torch.tensor([[5.0]])
        processes.sum_gradients(parameters)
        return [p.grad.flatten().tolist() for p in parameters if p.grad is not None]

    assert work(DistributedContext()) == [[1.0, 2.0], [0.0], [0.0]]
    assert in_threads(2, work) == [[[3.0, 6.0], [5.0], [0.0]]] * 2


def test_messages_are_bounded_and_sum_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of 3, 2, 8 and 1 float32 in messages of at most 20 bytes: (3, 2), (8), (1)."""
    monkeypatch.setattr("difrl.runtime.distributed.BUCKET", 20)

    def work(processes: DistributedContext) -> list[list[float]]:
        parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 2, 8, 1)]
        for number, p in enumerate(parameters):
            p.grad = torch.full_like(p, number + 10.0 * processes.rank)
        sizes: list[int] = []
        inner = processes.sum
        processes.sum = lambda tensor: sizes.append(tensor.numel()) or inner(tensor)  # type: ignore[func-returns-value, method-assign]
        processes.sum_gradients(parameters)
        assert sizes == [5, 8, 1]
        return [p.grad.tolist() for p in parameters if p.grad is not None]

    assert in_threads(2, work) == [[[10.0] * 3, [12.0] * 2, [14.0] * 8, [16.0]]] * 2


def launch(count: int, *module: str) -> None:
    """Run a module with its arguments on `count` processes."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    done = subprocess.run(
        [sys.executable, *several, "-m", *module],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def recorded(model: Path, place: Path, count: int, sections: dict[str, Any]) -> Path:
    """Return the folder of a run on `count` processes, beside the records of tests/recorded_run.py."""
    place.mkdir()
    smooth = [{"import": "tests.fakes:Brightness"}]  # a file size would jump where an image differs by rounding
    config = recipe(model, place / "run", rewards=smooth, **sections)
    (place / "config.yaml").write_text(to_yaml(config))
    launch(count, "tests.recorded_run", str(place / "config.yaml"))
    contexts = [json.loads(path.read_text()) for path in sorted(place.glob("context-*.json"))]
    assert contexts == [{"rank": r, "count": count, "torch": count, "device": "cpu"} for r in range(count)]
    return place / "run"


def draws(run: Path, number: int) -> dict[str, Tensor]:
    """Return the samples of a step over all processes, in the order of their numbers."""
    parts = [load_file(path) for path in sorted(run.parent.glob(f"rollout-*-{number}.safetensors"))]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = joined["samples"].argsort()
    return {name: value[order] for name, value in joined.items()}


def saved(run: Path, name: str) -> dict[str, Tensor]:
    """Return a file of the last checkpoint."""
    return load_file(run / f"checkpoints/step-{STEPS:06d}/{name}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(sd3: Path, tmp_path: Path, case: str) -> None:
    """One global batch gives the same samples, metrics and weights on one process and on two."""
    one, two = (recorded(sd3, tmp_path / f"{case}-{n}", n, CASES[case]) for n in (1, 2))

    for number in range(STEPS):
        alone, together = draws(one, number), draws(two, number)
        assert together["samples"].tolist() == alone["samples"].tolist() == list(range(12))
        for name in ("latents", "images"):  # float32, after three steps too
            torch.testing.assert_close(together[name], alone[name], rtol=1e-5, atol=1e-5)

    rows, expected_rows = (list(map(without_times, read_metrics(run))) for run in (two, one))
    assert len(rows) == STEPS + 1
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)

    pictures = sorted(path.name for path in (one / "samples").glob("*.png"))
    assert pictures == sorted(path.name for path in (two / "samples").glob("*.png"))
    assert len(pictures) >= 3
    for name in pictures:
        shown, expected_picture = (np.asarray(Image.open(run / "samples" / name), dtype=int) for run in (two, one))
        assert np.abs(shown - expected_picture).max() <= 1, name  # of 255: a value may round the other way

    moments, expected_moments = saved(two, "optimizer"), saved(one, "optimizer")
    for key, value in expected_moments.items():
        torch.testing.assert_close(moments[key], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()) + 1e-8)
    for name in ("trained", "snapshots"):
        weights, expected_weights = saved(two, name), saved(one, name)
        assert weights.keys() == expected_weights.keys()
        apart = [(weights[key] - value).abs().flatten() for key, value in expected_weights.items()]
        # Steps are of 1e-3. Adam divides a gradient by its size, so one that is 0 but for rounding still moves its weight.
        assert not apart or (torch.cat(apart) > 2e-5).float().mean() < 1e-3


@pytest.mark.slow
def test_two_processes_resumed_are_the_same_run(sd3: Path, tmp_path: Path) -> None:
    """Bits are equal, although the reward draws from the global random state and each process keeps other references.

    Each process scores its first group while it draws its second one.
    """
    (tmp_path / "five.txt").write_text("".join(f"a red circle and {n} squares\n" for n in range(5)))
    config = recipe(
        sd3,
        tmp_path / "whole",
        data={"train": str(tmp_path / "five.txt"), "prompts_per_step": 4, "group_size": 2},
        rollout={"overlap": True, "batch": 2},
        rewards=[{"import": "tests.fakes:Moody", "shape": {"kind": "par"}}],
        references={"count": 2},
        train={"steps": 4},
        eval={"every": 0},
        checkpoint={"keep": 9},
    )
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    launch(2, "difrl", "train", str(tmp_path / "recipe.yaml"))
    whole, resumed = config.output_dir, tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    for step in (2, 3, 4):
        shutil.rmtree(resumed / f"checkpoints/step-{step:06d}")
    launch(2, "difrl", "train", str(tmp_path / "recipe.yaml"), f"output_dir={resumed}", "--resume")
    assert list(map(without_times, read_metrics(resumed))) == list(map(without_times, read_metrics(whole)))
    for name in ("trained", "optimizer", "source", "random"):
        place = f"checkpoints/step-000004/{name}.safetensors"
        assert (resumed / place).read_bytes() == (whole / place).read_bytes(), name
    known = load_file(whole / "checkpoints/step-000004/source.safetensors")
    assert all(len(known[f"{rank}/number"]) > 2 for rank in range(2))
