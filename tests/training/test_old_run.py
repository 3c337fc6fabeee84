"""A run folder that an earlier version wrote (difrl b0ea757: image model, LoRA of rank 1) is resumed.

old_run/ holds its recipe, its metrics of four steps, its checkpoint after step 2 and the LoRA after step 4. Its reward is the
judge, a smooth function of the pixels: float error cannot tip a detection over a threshold.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from difrl.config.load import read_config
from difrl.training.run import train
from tests.training.test_run import Spoken

OLD = Path(__file__).parent / "old_run"
ADDED = {"nfe/check"}
"""Metrics that the earlier version did not have."""


def rows(folder: Path) -> list[dict[str, float | None]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def test_a_run_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    """Metrics and weights are those of the earlier version.

    On one machine they are the same bits. CPUs of other kinds sum in another order, which is a relative error of about 1e-6
    in a gradient. It grows in the third and fourth update, because Adam divides each element by its own size: elements near 0
    are uncertain by a share of the learning rate, 2e-4.
    """
    folder = tmp_path / "run"
    shutil.copytree(OLD, folder)
    config = read_config(folder / "config.yaml", [f"output_dir={folder}"])
    display = Spoken()
    train(config, resume=True, display=display)
    (said,) = [message for message in display.messages if "digests" in message]
    assert "written by an earlier version, without digests" in said

    found, expected = rows(folder), rows(OLD)
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4]
    for one, other in zip(found, expected, strict=True):
        assert [key for key in one if key not in ADDED] == list(other)
        assert {key: one[key] for key in other} == pytest.approx(other, rel=2e-3, abs=1e-6, nan_ok=True)
    weights = load_file(folder / "checkpoints/step-000004/trained.safetensors")
    for name, value in load_file(OLD / "trained-000004.safetensors").items():
        torch.testing.assert_close(
            weights[name], value, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
