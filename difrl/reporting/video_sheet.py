"""Sheets of videos: strips of frames as a picture, and the same sheet playing as an animated WebP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from difrl.data.image_files import read_image
from difrl.data.videos import Videos
from difrl.reporting.image_grid import compare
from difrl.reporting.number_format import ScoreTable
from rewards.frames import spread_frames
from rewards.video_files import write_frames, write_video_file

LARGEST = 160
"""Pixels of the longer side of a frame on a sheet: larger ones are reduced."""
SMALLEST = 64
"""Pixels of the height of a frame in a strip, at least."""
MOST_FRAMES, STRIP = 24, 6
"""Most frames of a playing sheet, and of a strip, evenly spaced."""
GAP = 1
"""Pixels between the frames of a strip, before it is enlarged."""
QUALITY = 85


@dataclass(frozen=True, eq=False)
class VideoSheet:
    """Videos of P prompts, N of each, one column a set. Only small copies of them are in memory."""

    prompts: Sequence[str]
    sets: Mapping[str, Videos]
    """Label -> P N videos, one prompt after the other."""
    scores: Mapping[str, ScoreTable]
    inputs: Sequence[Path] = ()
    """Input images of the prompts, [P] or none."""
    default: ClassVar[Path | None] = Path("samples.png")

    def show(self, console: Console) -> None: ...

    def save(self, path: Path) -> Path:
        """Write the strips, and beside them the playing sheet with the suffix .webp. Return the path of the strips."""
        place = path if path.suffix else path.with_suffix(".png")
        small = {label: self._reduce(videos) for label, videos in self.sets.items()}
        strips = {label: _build_strips(videos) for label, videos in small.items()}
        scale = max(1, math.ceil(SMALLEST / next(iter(strips.values())).shape[-2]))
        inputs = [read_image(path) for path in self.inputs]
        compare(strips, self.prompts, self.scores or None, scale, inputs).save(place)
        count = next(iter(small.values())).shape[2]
        moments = [{label: videos[:, :, i] for label, videos in small.items()} for i in range(count)]
        sheets = [compare(moment, self.prompts, self.scores or None, inputs=inputs) for moment in moments]
        write_frames(sheets, place.with_suffix(".webp"), quality=QUALITY)
        return place

    def save_each(self, path: Path) -> Sequence[Path]:
        """Write every video as a file of its own, SET/PROMPT-SAMPLE.webp in a folder with the name of the sheet."""
        files = []
        for label, videos in self.sets.items():
            folder, each = path.with_suffix("") / label.replace(" ", ""), len(videos) // len(self.prompts)
            folder.mkdir(parents=True, exist_ok=True)
            for rows, frames in videos.batches():
                for row, video in zip(range(rows.start, rows.stop), frames, strict=True):
                    files.append(folder / f"{row // each + 1}-{row % each + 1}.webp")
                    write_video_file(video, files[-1])
        return files

    def as_data(self) -> dict[str, Any]:
        """Return {"prompts": [P], "scores": [P][N]}, for the single set of a training step."""
        return {"prompts": self.prompts, "scores": next(iter(self.scores.values()), [])}

    def _reduce(self, videos: Videos) -> Tensor:
        """Return small copies [P, N, F, 3, h, w] of videos, which are decoded by batches."""
        small = torch.cat([_shrink(spread_frames(frames, MOST_FRAMES)).cpu() for _, frames in videos.batches()])
        return small.view(len(self.prompts), -1, *small.shape[1:])


def _shrink(videos: Tensor) -> Tensor:
    """Return videos [B, F, 3, H, W] with sides of at most LARGEST pixels."""
    sides = videos.shape[-2:]
    share = LARGEST / max(sides)
    if share >= 1:
        return videos
    size = [max(1, round(side * share)) for side in sides]
    return F.interpolate(videos.flatten(0, 1), size, mode="area").view(*videos.shape[:3], *size)


def _build_strips(videos: Tensor) -> Tensor:
    """Return videos [P, N, F, 3, h, w] as pictures of some frames side by side, [P, N, 3, h, …]."""
    shown = spread_frames(videos.flatten(0, 1), STRIP).unbind(1)
    white = torch.ones(*shown[0].shape[:-1], GAP)
    parts = [part for frame in shown for part in (white, frame)][1:]
    strips = torch.cat(parts, dim=-1)
    return strips.view(*videos.shape[:2], *strips.shape[1:])
