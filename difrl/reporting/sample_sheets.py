"""Sheets of samples of fixed prompts, in one or more sets side by side: pictures, strips of videos, or a table of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from rich.console import Console

from difrl.data.image_files import read_image
from difrl.data.rollout import Rollout
from difrl.reporting.image_grid import compare
from difrl.reporting.number_format import ScoreTable
from difrl.reporting.text_sheet import TextSheet
from difrl.reporting.video_sheet import VideoSheet


class Sheet(Protocol):
    """Samples arranged for people to look at."""

    @property
    def default(self) -> Path | None:
        """Default path of `difrl sample`; None if the sheet is shown on the terminal instead of saved."""

    def show(self, console: Console) -> None:
        """Print the sheet on a terminal, unless it is a picture."""

    def save(self, path: Path) -> Path:
        """Write the sheet and return its path; a path without a suffix gets one."""

    def save_each(self, path: Path) -> Sequence[Path]:
        """Write samples that a sheet cannot show as files of their own, beside the sheet at `path`, and return their paths."""

    def as_data(self) -> dict[str, Any]:
        """Return the sheet as JSON data."""


@dataclass(frozen=True, eq=False)
class PictureSheet:
    """Images of P prompts, N of each, one column a set."""

    prompts: Sequence[str]
    sets: Mapping[str, torch.Tensor]
    """Label -> [P, N, 3, H, W]."""
    scores: Mapping[str, ScoreTable]
    inputs: Sequence[Path] = ()
    """Input images of the prompts, [P] or none."""
    default: ClassVar[Path | None] = Path("samples.png")

    def show(self, console: Console) -> None: ...

    def save(self, path: Path) -> Path:
        place = path if path.suffix else path.with_suffix(".png")
        inputs = [read_image(path) for path in self.inputs]
        compare(self.sets, self.prompts, self.scores or None, inputs=inputs).save(place)
        return place

    def save_each(self, path: Path) -> Sequence[Path]:
        return ()

    def as_data(self) -> dict[str, Any]:
        """Return {"prompts": [P], "scores": [P][N]}, for the single set of a training step."""
        return {"prompts": self.prompts, "scores": next(iter(self.scores.values()), [])}


def build_sheet(prompts: Sequence[str], rollouts: Mapping[str, Rollout], scores: Mapping[str, ScoreTable]) -> Sheet:
    """Build a sheet from one rollout a set. Each has equally many samples of every prompt, one prompt after the other."""
    drawn = next(iter(rollouts.values())).prompts
    inputs = [prompt.image for prompt in drawn[:: len(drawn) // len(prompts)] if prompt.image is not None]
    images = {
        label: r.images.cpu().unflatten(0, (len(prompts), -1)) for label, r in rollouts.items() if r.images is not None
    }
    if images:
        return PictureSheet(prompts, images, scores, inputs)
    videos = {label: r.videos for label, r in rollouts.items() if r.videos is not None}
    if videos:
        return VideoSheet(prompts, videos, scores, inputs)
    texts = {}
    for label, rollout in rollouts.items():
        found, size = rollout.texts or (), len(rollout) // len(prompts)
        texts[label] = [found[row * size : (row + 1) * size] for row in range(len(prompts))]
    return TextSheet(prompts, texts, scores)
