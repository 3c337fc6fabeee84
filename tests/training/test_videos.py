"""Runs of videos with the shipped tiny-wan, a step each: sheets, batches that do not matter, recorded videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from difrl.config import RunConfig
from difrl.config.load import read_config
from difrl.inference.loaded_run import open_run
from difrl.inference.preference_pairs import make_pairs
from difrl.policies.errors import ModelError
from difrl.runtime.paths import recipes_folder
from difrl.training.run import train
from rewards.video_files import read_video_file

SMALL = ["data.prompts_per_step=2", "data.group_size=2", "rollout.steps=2", "train.steps=1", "eval.images=2"]
SMALL += ["eval.final_images=2", "eval.show=1", "eval.columns=2", "eval.rlg=[]", "checkpoint.every=1"]


def config(folder: Path, *overrides: str) -> RunConfig:
    return read_config(recipes_folder() / "video-quickstart.yaml", [*SMALL, f"output_dir={folder}", *overrides])


def last_row(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {key: value for key, value in rows[-1].items() if value is not None and not key.startswith("time/")}


@pytest.mark.slow
def test_a_run_of_videos(tmp_path: Path) -> None:
    train(config(tmp_path / "run"))
    with Image.open(tmp_path / "run/samples/step-000001.webp") as playing:
        assert playing.n_frames == 5  # type: ignore[attr-defined]
    assert "data:image/webp;base64," in (tmp_path / "run/report.html").read_text()
    row = last_row(tmp_path / "run")
    assert {"reward/motion", "watch/geneval", "diversity/pixels"} <= row.keys()
    train(config(tmp_path / "one", "rollout.batch=1", "rollout.overlap=true"))
    other = last_row(tmp_path / "one")
    assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
    rollout = open_run(tmp_path / "run").sample(["a red circle moving left"], per_prompt=3)
    assert rollout.videos is not None
    ((_, frames),) = rollout.batches()
    assert frames.shape == (3, 5, 3, 32, 32)
    assert 0 <= frames.min() <= frames.max() <= 1


@pytest.mark.slow
def test_pairs_of_videos_can_be_trained_on(tmp_path: Path) -> None:
    by_size = 'rewards=[{"name": "jpeg_incompressibility", "frames": {"sample": 2}}]'  # differs for any two videos
    made = make_pairs(config(tmp_path / "unused", by_size), tmp_path / "made", 2)
    assert made.pairs == 2
    rows = [json.loads(line) for line in (tmp_path / "made/pairs.jsonl").read_text().splitlines()]
    assert all(
        len(read_video_file(tmp_path / "made" / row[key])) == 5 for row in rows for key in ("chosen", "rejected")
    )
    data = [f"data.train={tmp_path / 'made/pairs.jsonl'}", "data.rows=pairs", "objective={kind: preference}"]
    recorded = [
        *data,
        "advantage={}",
        "anchors=[]",
        "snapshots={}",
        "algorithm=diffusion_dpo",
        "likelihood={kind: forward}",
    ]
    train(config(tmp_path / "run", *recorded))
    assert "preference/margin" in last_row(tmp_path / "run")
    with pytest.raises(
        ModelError, match=r"have 5 frames, and the samples of the run 9; cut the videos, or set rollout\.frames: 5"
    ):
        train(config(tmp_path / "other", *recorded, "rollout.frames=9"))
