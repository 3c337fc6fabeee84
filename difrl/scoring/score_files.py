"""`difrl score`: scores of images, videos and texts in files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.table import Table

from difrl.config import RewardConfig
from difrl.config.yaml_source import ConfigError
from difrl.data.modality import IMAGES, TEXTS, VIDEOS, Modality, read_images, read_videos
from difrl.reporting.number_format import number
from difrl.runtime.errors import MissingFile
from difrl.runtime.log_capture import route_warnings
from difrl.runtime.progress import count_done, phase
from difrl.scoring.scorer import modality_mismatch
from difrl.scoring.standalone import build_standalone, check_standalone
from rewards import Reward, score
from rewards.video_files import is_video_file

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A file with its prompt: an image [1, 3, H, W] or a video [1, F, 3, H, W] in [0, 1], or a text."""

    file: Path
    prompt: str
    content: torch.Tensor | str
    image: Path | None = None
    """Input image, for rewards of edits."""

    @property
    def modality(self) -> Modality:
        """Modality of the content."""
        if isinstance(self.content, torch.Tensor):
            return IMAGES if self.content.ndim == 4 else VIDEOS
        return TEXTS

    @property
    def batch_key(self) -> object:
        """A key that is equal for samples that can be scored in one call."""
        return self.content.shape if isinstance(self.content, torch.Tensor) else "text"


def read_samples(files: Sequence[Path], prompts: Sequence[str], images: Sequence[Path] = ()) -> list[Sample]:
    """Read files, each an image or UTF-8 text. There is one prompt a file, or one for all, and the same of input images."""
    prompt_of_each = _repeat("--prompt", prompts, len(files))
    image_of_each = _repeat("--image", images or [None], len(files))
    samples = []
    with phase("reading files", total=len(files)):
        for file, prompt, image in zip(files, prompt_of_each, image_of_each, strict=True):
            samples.append(Sample(file, prompt, _read_content(file), image and image.absolute()))
            count_done()
    return samples


def _repeat(option: str, values: Sequence[T], count: int) -> Sequence[T]:
    """Return one value a file. ConfigError unless there is one for all, or one each."""
    if len(values) not in (1, count):
        raise ConfigError(f"{option}: found {len(values)} for {count} files, expected one for all, or one a file")
    return values if len(values) == count else [*values] * count


def _read_content(file: Path) -> torch.Tensor | str:
    if not file.is_file():
        raise MissingFile(f"{file}: there is no such file")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return _read_picture(file)
    return _read_picture(file) if "\0" in text else text


def _read_picture(file: Path) -> torch.Tensor:
    return read_videos([file]) if is_video_file(file) else read_images([file])


@dataclass(frozen=True)
class RewardColumn:
    """Scores of the samples by one reward."""

    values: Sequence[float | None]
    """Value of each sample; None if it could not be scored."""
    warned: bool = False
    """True if the reward warned of something, such as failures after which samples were dropped."""

    @property
    def unexplained(self) -> bool:
        """True if a sample has no score and no warning explains it."""
        return None in self.values and not self.warned


def score_files(
    rewards: Sequence[RewardConfig],
    samples: Sequence[Sample],
    metadata: Mapping[str, Any],
    warn: Callable[[str], object],
) -> dict[str, RewardColumn]:
    """Return a column of scores for each reward, by label. Its warnings are passed to `warn`."""
    check_standalone(rewards)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        config.label: _score_column(build_standalone(config, device), samples, metadata, warn) for config in rewards
    }


def _score_column(
    reward: Reward, samples: Sequence[Sample], metadata: Mapping[str, Any], warn: Callable[[str], object]
) -> RewardColumn:
    warnings: list[str] = []

    def collect(text: str) -> None:
        warnings.append(text)
        warn(text)

    with route_warnings(collect):
        values = _score_samples(reward, samples, metadata)
    return RewardColumn(values, bool(warnings))


def _score_samples(reward: Reward, samples: Sequence[Sample], metadata: Mapping[str, Any]) -> list[float | None]:
    for sample in samples:
        if problem := modality_mismatch(reward, sample.modality):
            raise ConfigError(f"{sample.file}: not for the reward '{reward.name}': {problem}")
    values: list[float | None] = [None] * len(samples)
    for key in dict.fromkeys(sample.batch_key for sample in samples):
        rows = [i for i, sample in enumerate(samples) if sample.batch_key == key]
        contents = [samples[i].content for i in rows]
        images = [image for image in contents if isinstance(image, torch.Tensor)]
        batch = torch.cat(images) if images else [text for text in contents if isinstance(text, str)]
        inputs = [samples[i].image for i in rows]
        facts = [metadata if image is None else {**metadata, "image": str(image)} for image in inputs]
        with phase(f"reward {reward.name}"):
            scores = score(reward, batch, [samples[i].prompt for i in rows], facts)
        for i, value, valid in zip(rows, scores.values.tolist(), scores.valid.tolist(), strict=True):
            values[i] = value if valid else None
    return values


def build_table(samples: Sequence[Sample], columns: Mapping[str, RewardColumn]) -> Table:
    """Build a table with a row a file and a column a reward. Below is the mean of the files that could be scored."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_footer=len(samples) > 1)
    table.add_column("file", overflow="fold", footer="mean")
    for name, column in columns.items():
        table.add_column(name, justify="right", footer=_format(_mean(column.values)))
    for row, sample in enumerate(samples):
        table.add_row(str(sample.file), *(_format(column.values[row]) for column in columns.values()))
    return table


def _format(value: float | None) -> str:
    return "not scored" if value is None else number(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
