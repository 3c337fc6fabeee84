"""What processes agree on, alone and, in the slow tests, as two real processes of torchrun."""

from __future__ import annotations

import json
import math
import os
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

from difrl.metrics import read_metrics
from difrl.processes import Processes
from difrl.reading import to_yaml
from tests.fakes import in_threads
from tests.recipes import AWM, FLOW_GRPO, recipe

ROOT = Path(__file__).parent.parent
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
    processes = Processes()
    assert (processes.count, processes.rank, processes.is_main) == (1, 0, True)
    rows = torch.arange(3)
    assert processes.gather(rows).tolist() == processes.own(rows).tolist() == [0, 1, 2]
    assert processes.sums({"a": torch.tensor(2), "b": torch.tensor(0.5)}) == {"a": 2.0, "b": 0.5}
    assert processes.sums({}) == {}
    assert (processes.all(True), processes.all(False), processes.any(True), processes.any(False)) == (
        True,
        False,
        True,
        False,
    )


def test_means_are_over_what_is_a_number() -> None:
    columns = {"a": torch.tensor([1.0, math.nan, 4.0]), "b": torch.tensor([math.nan]), "c": torch.zeros(0)}
    assert Processes().means(columns) == pytest.approx({"a": 2.5, "b": math.nan, "c": math.nan}, nan_ok=True)

    def two(processes: Processes) -> dict[str, float]:
        return processes.means({"a": torch.tensor([[1.0, math.nan, 4.0], [7.0]][processes.rank])})

    assert in_threads(2, two) == [{"a": 4.0}] * 2  # of three numbers, wherever they are


def test_a_flag_of_one_process_is_known_to_all() -> None:
    flags = in_threads(2, lambda p: (p.any(p.rank == 1), p.all(p.rank == 1), p.any(False), p.all(True)))
    assert flags == [(True, False, False, True)] * 2


def test_gradients_are_summed_and_absent_ones_are_zero() -> None:
    def work(processes: Processes) -> list[list[float]]:
        parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))]
        parameters[0].grad = torch.tensor([1.0, 2.0]) * (processes.rank + 1)
        if processes.rank == 1:
            parameters[1].grad = torch.tensor([[5.0]])
        processes.sum_gradients(parameters)
        return [p.grad.flatten().tolist() for p in parameters if p.grad is not None]

    assert work(Processes()) == [[1.0, 2.0], [0.0], [0.0]]
    assert in_threads(2, work) == [[[3.0, 6.0], [5.0], [0.0]]] * 2


def recorded(model: Path, place: Path, count: int, sections: dict[str, Any]) -> Path:
    """The run folder of a run on `count` processes; beside it is what tests/recorded_run.py keeps."""
    place.mkdir()
    smooth = [{"import": "tests.fakes:Brightness"}]  # a file size would jump where an image differs by rounding
    config = recipe(model, place / "run", rewards=smooth, **sections)
    (place / "config.yaml").write_text(to_yaml(config))
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    done = subprocess.run(
        [sys.executable, *several, "-m", "tests.recorded_run", str(place / "config.yaml")],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    worlds = [json.loads(path.read_text()) for path in sorted(place.glob("world-*.json"))]
    assert worlds == [{"rank": r, "count": count, "torch": count, "device": "cpu"} for r in range(count)]
    return place / "run"


def draws(run: Path, number: int) -> dict[str, Tensor]:
    """The samples of a step over all processes, in the order of their numbers."""
    parts = [load_file(path) for path in sorted(run.parent.glob(f"rollout-*-{number}.safetensors"))]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = joined["samples"].argsort()
    return {name: value[order] for name, value in joined.items()}


def assert_same_weights(found: Path, expected: Path, name: str) -> None:
    """The optimizer's moments to float order, and the weights wherever they follow from more than rounding.

    Adam divides a gradient by its own size, so one that is 0 but for rounding still moves its weight by about lr.
    """
    one, other = (load_file(run / f"checkpoints/step-{STEPS:06d}/{name}.safetensors") for run in (found, expected))
    moments = load_file(expected / f"checkpoints/step-{STEPS:06d}/optimizer.safetensors")
    size = {key: moments[f"{key.removeprefix('ema/')}/exp_avg_sq"].sqrt() for key in other}
    largest = max(float(value.max()) for value in size.values())
    compared = 0
    for key, weight in other.items():
        moved = size[key] > 1e-3 * largest
        torch.testing.assert_close(
            one[key][moved], weight[moved], rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
        compared += int(moved.sum())
    assert compared > sum(weight.numel() for weight in other.values()) / 3


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(sd3: Path, tmp_path: Path, case: str) -> None:
    """The same global batch, drawn and learnt by one process and by two: same samples, metrics and weights."""
    one, two = (recorded(sd3, tmp_path / f"{case}-{n}", n, CASES[case]) for n in (1, 2))

    for number in range(STEPS):
        alone, together = draws(one, number), draws(two, number)
        assert together["samples"].tolist() == alone["samples"].tolist() == list(range(12))
        # float32; later steps start from weights that differ by rounding
        tolerance = {"rtol": 1e-4, "atol": 1e-5 if number == 0 else 1e-3}
        torch.testing.assert_close(together["latents"], alone["latents"], **tolerance)
        torch.testing.assert_close(together["images"], alone["images"], **tolerance)

    for row, expected in zip(read_metrics(two), read_metrics(one), strict=True):
        kept = {name: value for name, value in row.items() if not name.startswith("time/")}
        assert kept == pytest.approx(
            {n: v for n, v in expected.items() if not n.startswith("time/")}, rel=1e-3, abs=1e-5
        )

    pictures = sorted(path.name for path in (one / "samples").glob("*.png"))
    assert pictures == sorted(path.name for path in (two / "samples").glob("*.png"))
    assert len(pictures) >= 3
    for name in pictures:
        shown, expected_picture = (np.asarray(Image.open(run / "samples" / name), dtype=int) for run in (two, one))
        assert np.abs(shown - expected_picture).max() <= 1, name  # of 255: a value may round the other way

    folder = f"checkpoints/step-{STEPS:06d}"
    moments, expected_moments = (load_file(run / folder / "optimizer.safetensors") for run in (two, one))
    for key, value in expected_moments.items():
        torch.testing.assert_close(moments[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()) + 1e-7)
    assert_same_weights(two, one, "trained")
    assert_same_weights(two, one, "snapshots")
