"""`difrl score`: what rewards say of images and texts in files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from rich.table import Table

from difrl.config import RewardConfig
from difrl.config.yaml_source import ConfigError
from difrl.data.modality import IMAGES, TEXTS, Modality, read_images
from difrl.reporting.number_format import number
from difrl.runtime.log_capture import notices
from difrl.scoring.scorer import modality_mismatch
from difrl.scoring.standalone import build_standalone, check_standalone
from rewards import Reward, score


@dataclass(frozen=True)
class Sample:
    """A file with its prompt: an image [1, 3, H, W] in [0, 1], or a text."""

    file: Path
    prompt: str
    content: torch.Tensor | str

    @property
    def medium(self) -> Modality:
        """Of the content."""
        return IMAGES if isinstance(self.content, torch.Tensor) else TEXTS

    @property
    def alike(self) -> object:
        """Samples of which this is equal can be scored in one call."""
        return self.content.shape if isinstance(self.content, torch.Tensor) else "text"


def read_samples(files: Sequence[Path], prompts: Sequence[str]) -> list[Sample]:
    """The files' contents: an image, or else UTF-8 text; one prompt is that of all files."""
    if len(prompts) not in (1, len(files)):
        raise ConfigError(f"--prompt: found {len(prompts)} for {len(files)} files, expected one for all, or one a file")
    of_each = prompts if len(prompts) == len(files) else [*prompts] * len(files)
    return [Sample(file, prompt, _content(file)) for file, prompt in zip(files, of_each, strict=True)]


def _content(file: Path) -> torch.Tensor | str:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    try:
        return read_images([file])
    except UnidentifiedImageError:
        pass
    except (OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{file}: cannot be read as an image: {error}") from error
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: neither an image nor UTF-8 text") from error


@dataclass(frozen=True)
class Column:
    """What a reward says of samples."""

    values: Sequence[float | None]
    """Of each sample; None where it could not score it."""
    warned: bool = False
    """Whether it warned of something, such as failures after which samples were left out."""

    @property
    def unexplained(self) -> bool:
        """Whether it scored less than all, and did not say why."""
        return None in self.values and not self.warned


def score_files(
    rewards: Sequence[RewardConfig],
    samples: Sequence[Sample],
    metadata: Mapping[str, Any],
    warn: Callable[[str], object],
) -> dict[str, Column]:
    """Reward -> what it says of the samples; `warn` is told what it warns of meanwhile."""
    check_standalone(rewards)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {config.label: _column(build_standalone(config, device), samples, metadata, warn) for config in rewards}


def _column(
    reward: Reward, samples: Sequence[Sample], metadata: Mapping[str, Any], warn: Callable[[str], object]
) -> Column:
    warnings: list[str] = []

    def hear(text: str) -> None:
        warnings.append(text)
        warn(text)

    with notices(hear):
        values = _scored(reward, samples, metadata)
    return Column(values, bool(warnings))


def _scored(reward: Reward, samples: Sequence[Sample], metadata: Mapping[str, Any]) -> list[float | None]:
    for sample in samples:
        if problem := modality_mismatch(reward, sample.medium):
            raise ConfigError(f"{sample.file}: not for the reward '{reward.name}': {problem}")
    values: list[float | None] = [None] * len(samples)
    kinds = dict.fromkeys(sample.alike for sample in samples)
    for kind in kinds:
        rows = [i for i, sample in enumerate(samples) if sample.alike == kind]
        contents = [samples[i].content for i in rows]
        images = [image for image in contents if isinstance(image, torch.Tensor)]
        batch = torch.cat(images) if images else [text for text in contents if isinstance(text, str)]
        scores = score(reward, batch, [samples[i].prompt for i in rows], [metadata] * len(rows))
        for i, value, valid in zip(rows, scores.values.tolist(), scores.valid.tolist(), strict=True):
            values[i] = value if valid else None
    return values


def scores_table(samples: Sequence[Sample], found: Mapping[str, Column]) -> Table:
    """A row a file, a column a reward; the mean below, of the files that could be scored."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_footer=len(samples) > 1)
    table.add_column("file", overflow="fold", footer="mean")
    for name, column in found.items():
        table.add_column(name, justify="right", footer=_shown(_mean(column.values)))
    for row, sample in enumerate(samples):
        table.add_row(str(sample.file), *(_shown(column.values[row]) for column in found.values()))
    return table


def _shown(value: float | None) -> str:
    return "not scored" if value is None else number(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
