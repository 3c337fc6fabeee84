"""Runs that edit images: prompts with input images, rewards that compare with them, and sheets that show them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from difrl.config import RunConfig
from difrl.inference.loaded_run import open_run
from difrl.reporting.html import write_report
from difrl.reporting.metrics_file import read_metrics
from difrl.training.cost.estimate import estimate
from tests.recipes import recipe
from tests.tiny_pipelines import tiny_flux_kontext, tiny_qwen_image_edit
from tests.training.test_run import train

COLOURS = [(250, 10, 20), (10, 200, 30), (10, 20, 250)]


def write_edits(folder: Path, side: int) -> Path:
    """Write prompts with input images of three sizes, and a mask for the first."""
    rows = []
    for number, (colour, size) in enumerate(zip(COLOURS, [(1, 1), (2, 1), (3, 4)], strict=True)):
        Image.new("RGB", (size[0] * side, size[1] * side), colour).save(folder / f"{number}.png")
        rows.append({"prompt": "make it white", "image": f"{number}.png"})
    Image.new("L", (side, side), 0).save(folder / "mask.png")
    rows[0]["mask"] = "mask.png"
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "edits.jsonl"


def edit_recipe(model: Path, folder: Path, side: int, **model_settings: Any) -> RunConfig:
    prompts = str(write_edits(folder, side))
    return recipe(
        model,
        folder / "run",
        model={"train": "lora", "lora": {"rank": 2}, **model_settings},
        data={"train": prompts, "evaluation": prompts, "prompts_per_step": 2, "group_size": 2},
        rollout={"steps": 2, "height": side, "width": side},
        rewards=[{"name": "consistency", "options": {"metric": "l2"}}],
        train={"steps": 2},
        eval={"every": 1, "images": 3, "show": 3, "columns": 2},
    )


# Kontext resizes an input to a million pixels by default, which makes 65,000 tokens of this autoencoder's.
KONTEXT = {"max_sequence_length": 12, "inputs": {"_auto_resize": False}}


@pytest.mark.parametrize(
    ("build", "side", "settings"),
    [
        pytest.param(tiny_flux_kontext, 16, KONTEXT, id="flux-kontext"),
        pytest.param(
            tiny_qwen_image_edit, 32, {"max_sequence_length": 32}, id="qwen-image-edit", marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_edits_the_images_of_its_prompts(
    build: Callable[[Path], Path], side: int, settings: Mapping[str, Any], tmp_path: Path
) -> None:
    """The same instruction for three images. The last sheet has each input; the run opens again to edit another image."""
    config = edit_recipe(build(tmp_path / "model"), tmp_path, side, **settings)
    assert estimate(config, 1).model.forward > 0  # without weights, the input image included
    train(config)
    rows = [row for row in read_metrics(config.output_dir) if "reward/mean" in row]
    assert [0 < row["reward/mean"] < 1 and row["grad_norm"] > 0 for row in rows] == [True, True]
    sheet = np.asarray(Image.open(config.output_dir / "samples" / "step-000002.png"))
    assert all((sheet == colour).all(-1).sum() > 1000 for colour in COLOURS)
    assert "data:image/png" in write_report([config.output_dir], tmp_path / "report.html").read_text()
    Image.new("RGB", (side, side), (9, 9, 9)).save(tmp_path / "other.png")
    opened = open_run(config.output_dir, device="cpu")
    one, other = (opened.sample(["make it white"], image=tmp_path / name).images for name in ("0.png", "other.png"))
    assert one is not None
    assert other is not None
    assert one.shape == (1, 3, side, side)
    assert not np.allclose(one, other, atol=1e-4)
