"""Inputs of a run that are read before its model: prompts, recorded samples, rewards and trackers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from difrl.config import RunConfig
from difrl.config.yaml_source import ConfigError
from difrl.data.modality import find_modality
from difrl.data.prompts import Prompt, check_images, load_prompts
from difrl.data.recorded_samples import RecordedGroup, load_recorded_samples
from difrl.reporting.trackers import TrackerFactory, find_trackers
from difrl.runtime.errors import UserError
from difrl.runtime.progress import phase
from difrl.scoring import Scorer
from difrl.scoring.diversity import Diversity
from difrl.training.trainer import find_indivisible


@dataclass(frozen=True)
class Inputs:
    """Prompts, rewards and trackers of a run."""

    train: Sequence[Prompt]
    evaluation: Sequence[Prompt]
    """Empty where the recipe has no evaluation prompts."""
    recorded: Sequence[RecordedGroup]
    """Samples of files, to learn from or to rehearse."""
    scorer: Scorer
    diversity: Diversity
    trackers: Sequence[TrackerFactory]
    images: Mapping[str, Sequence[Path]]
    """Key of the recipe -> image files that the rows of its file name: input images of prompts, and recorded images."""


def load_inputs(config: RunConfig, processes: int, device: torch.device | str = "cpu") -> Inputs:
    """Load the inputs of a run by a number of processes. Raise ConfigError with every problem in them at once."""
    modality, data, problems = find_modality(config), config.data, list[str]()

    @contextmanager
    def collected(place: str) -> Iterator[None]:
        try:
            with phase(f"reading {place}"):
                yield
        except ConfigError as error:
            problems.extend(error.problems)
        except UserError as error:
            problems.append(f"{place}: {error}")

    recorded, images = list[RecordedGroup](), dict[str, Sequence[Path]]()
    with collected("data.train"):
        if data.rows == "prompts":
            train = load_prompts(data.train, images=modality.takes_images)
            check_images(train)
            images["data.train"] = _image_files(train)
        else:
            recorded += load_recorded_samples(data, modality)
            train = [group.prompt for group in recorded]
            images["data.train"] = _image_files(train, recorded)
    with collected("data.evaluation"):
        evaluation = [] if data.evaluation is None else load_prompts(data.evaluation, images=modality.takes_images)
        check_images(evaluation)
        images["data.evaluation"] = _image_files(evaluation)
    with collected("rehearsal.train"):
        if config.rehearsal is not None:
            rehearsed = load_recorded_samples(config.rehearsal, modality)
            recorded += rehearsed
            images["rehearsal.train"] = _image_files([group.prompt for group in rehearsed], rehearsed)
    with collected("rewards"):
        scorer = Scorer.build(config.rewards, config.watch, device, modality)
    with collected("eval.diversity"):
        diversity = Diversity.build(config.eval.diversity)
    with collected("trackers"):
        trackers = find_trackers(config)
    problems += find_indivisible(config, processes)
    if problems:
        raise ConfigError(*problems)
    return Inputs(train, evaluation, recorded, scorer, diversity, trackers, images)


def _image_files(prompts: Sequence[Prompt], groups: Sequence[RecordedGroup] = ()) -> list[Path]:
    """Return the input images and masks of prompts, and the images of recorded groups, each once."""
    given = [path for prompt in prompts for path in prompt.files.values()]
    recorded = [item for group in groups for item in group.items if isinstance(item, Path)]
    return list(dict.fromkeys([*given, *recorded]))
