"""Inputs of a run that are read before its model: prompts, recorded samples, rewards and trackers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from difrl.config import RunConfig
from difrl.config.yaml_source import ConfigError
from difrl.data.modality import MODALITIES
from difrl.data.prompts import Prompt, load_prompts
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


def load_inputs(config: RunConfig, processes: int, device: torch.device | str = "cpu") -> Inputs:
    """Load the inputs of a run by a number of processes. Raise ConfigError with every problem in them at once."""
    modality, data, problems = MODALITIES[config.likelihood.kind], config.data, list[str]()

    @contextmanager
    def collected(place: str) -> Iterator[None]:
        try:
            with phase(f"reading {place}"):
                yield
        except ConfigError as error:
            problems.extend(error.problems)
        except UserError as error:
            problems.append(f"{place}: {error}")

    recorded = list[RecordedGroup]()
    with collected("data.train"):
        if data.rows == "prompts":
            train = load_prompts(data.train)
        else:
            recorded += load_recorded_samples(data, modality)
            train = [group.prompt for group in recorded]
    with collected("data.evaluation"):
        evaluation = [] if data.evaluation is None else load_prompts(data.evaluation)
    with collected("rehearsal.train"):
        if config.rehearsal is not None:
            recorded += load_recorded_samples(config.rehearsal, modality)
    with collected("rewards"):
        scorer = Scorer.build(config.rewards, config.watch, device, modality)
    with collected("eval.diversity"):
        diversity = Diversity.build(config.eval.diversity)
    with collected("trackers"):
        trackers = find_trackers(config)
    problems += find_indivisible(config, processes)
    if problems:
        raise ConfigError(*problems)
    return Inputs(train, evaluation, recorded, scorer, diversity, trackers)
