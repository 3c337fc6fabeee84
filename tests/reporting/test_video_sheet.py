"""Sheets of videos: strips, the playing sheet, files of single videos, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.data.videos import Videos
from difrl.reporting.html import write_report
from difrl.reporting.sample_sheets import build_sheet
from difrl.reporting.video_sheet import VideoSheet
from rewards.video_files import read_video_file

FILMS = torch.rand(4, 7, 3, 8, 12, generator=torch.Generator().manual_seed(0))


def sheet(films: torch.Tensor = FILMS) -> VideoSheet:
    numbers = torch.arange(len(films))
    videos = Videos(tuple(films), lambda rows: torch.stack(list(rows)), 1)
    rollout = Rollout(tuple(Prompt(f"p{i // 2}", {}) for i in range(len(films))), numbers, numbers, {}, videos=videos)
    found = build_sheet(["p0", "p1"], {"": rollout}, {"": [[0.5, None], [1.0, 0.0]]})
    assert isinstance(found, VideoSheet)
    return found


def test_strips_and_the_playing_sheet(tmp_path: Path) -> None:
    path = sheet().save(tmp_path / "s")
    assert path == tmp_path / "s.png"
    with Image.open(path) as strips, Image.open(tmp_path / "s.webp") as playing:
        # Six frames of 12 pixels and five gaps, eight times as large, twice beside each other.
        assert strips.width > 2 * 8 * (6 * 12 + 5)
        assert playing.n_frames == 7  # type: ignore[attr-defined]
        assert playing.width < strips.width


def test_large_videos_are_reduced(tmp_path: Path) -> None:
    path = sheet(torch.rand(2, 30, 3, 320, 640)).save(tmp_path / "s.png")
    with Image.open(path) as strips, Image.open(tmp_path / "s.webp") as playing:
        assert strips.height < 2 * 80 + 200
        assert playing.n_frames == 24  # type: ignore[attr-defined]


def test_every_video_has_a_file(tmp_path: Path) -> None:
    files = sheet().save_each(tmp_path / "s.png")
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "s/1-1.webp",
        "s/1-2.webp",
        "s/2-1.webp",
        "s/2-2.webp",
    ]
    frames = read_video_file(files[2])
    assert len(frames) == 7
    assert frames[3].getpixel((0, 0)) == tuple((FILMS[2, 3, :, 0, 0] * 255).round().int().tolist())


def test_the_report_plays_videos_and_shows_strips_on_paper(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    made = sheet()
    made.save(tmp_path / "samples" / "step-000000")
    (tmp_path / "samples" / "step-000000.json").write_text(json.dumps(made.as_data()))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    _, after = page.split('<picture><source media="screen and (prefers-reduced-motion: no-preference)" srcset="')
    assert after.startswith("data:image/webp;base64,")
    assert '<img src="data:image/png;base64,' in after
    (tmp_path / "samples" / "step-000000.webp").write_bytes(b"damaged")
    assert "<picture>" not in write_report([tmp_path], tmp_path / "report.html").read_text()
