"""`difrl pairs`: write a file of samples from a model, by their rewards.

A group of samples is drawn for each prompt, as in training, and scored. The rows of a group are one of:

* pairs: its best and its worst sample; groups without a difference in reward give none,
* solved: all its samples, if their mean reward is high enough: data for a rehearsal (DPH-RL, arXiv:2509.07430).

    FOLDER/  pairs.jsonl or samples.jsonl (as data.rows reads them)  images/ (texts are in the rows)  inputs/ (input images of
    the prompts)  progress.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from difrl.config import RunConfig
from difrl.config.yaml_source import ConfigError
from difrl.data.modality import Modality, find_modality
from difrl.data.prompts import IMAGE, INPUT_IMAGE, check_images, load_prompts
from difrl.data.rollout import ScoredRollout
from difrl.policies.load import load_policy
from difrl.runtime.errors import UserError
from difrl.runtime.files import atomic_write, atomic_write_text, digest_file
from difrl.runtime.lock import lock_folder
from difrl.runtime.progress import phase
from difrl.scoring import Scorer
from difrl.training.rollout_source import PolicyRollouts

PATIENCE = 20
"""Most steps in a row without a row."""


class PairsError(UserError):
    """A file cannot be made, or a folder holds something else."""


@dataclass(frozen=True)
class Progress:
    """Contents of a folder, and the samples that it took."""

    pairs: int = 0
    """Number of rows: pairs, or samples of solved groups."""
    ties: int = 0
    """Number of groups without a row: all rewards equal or too low, or only empty texts."""
    unscored: int = 0
    """Number of groups with fewer than two samples to compare. No row is written of an empty text."""
    steps: int = 0


class Selection(Protocol):
    """A rule for the rows of a group."""

    @property
    def file(self) -> str:
        """The name of the file."""

    def candidates(self, valid: Tensor, filled: Tensor) -> Tensor:
        """Return the samples to compare, [B] bool. valid, filled [B]: samples with a reward, samples that are not empty."""

    def __call__(self, rewards: Tensor, key: str) -> Sequence[Mapping[str, int]]:
        """Return rows, each a mapping of keys to indices of samples, for the rewards [n] of a group's candidates.

        key: that of the sample in a row with one sample.
        """


@dataclass(frozen=True)
class BestAndWorst:
    """Preference pairs."""

    # progress.json holds the repr of a selection: names of classes and fields are part of the format.
    file: str = "pairs.jsonl"

    def candidates(self, valid: Tensor, filled: Tensor) -> Tensor:
        return valid & filled

    def __call__(self, rewards: Tensor, key: str) -> Sequence[Mapping[str, int]]:
        if rewards.max() == rewards.min():
            return []
        return [{"chosen": int(rewards.argmax()), "rejected": int(rewards.argmin())}]


@dataclass(frozen=True)
class Solved:
    """All samples of a group whose mean reward is `least` or more. Empty texts count in the mean."""

    least: float
    file: str = "samples.jsonl"

    def candidates(self, valid: Tensor, filled: Tensor) -> Tensor:
        return valid

    def __call__(self, rewards: Tensor, key: str) -> Sequence[Mapping[str, int]]:
        return [{key: i} for i in range(len(rewards))] if float(rewards.mean()) >= self.least else []


def make_pairs(
    config: RunConfig,
    folder: Path,
    count: int,
    device: torch.device | str = "cpu",
    selection: Selection = BestAndWorst(),
) -> Progress:
    """Draw whole steps until `folder` holds `count` rows or more. A killed run continues with the same rows."""
    if config.data.rows != "prompts":
        raise ConfigError(
            f"data.rows: pairs are made by sampling prompts, found {config.data.rows}; set data.rows: prompts"
        )
    settings = config.model_dump(mode="json", include=RECORDED_SECTIONS, exclude={"rollout": {"batch"}})
    settings["keep"] = repr(selection)
    with lock_folder(folder):
        rows, progress = _read_folder(folder, selection.file, settings)
        if progress.pairs >= count:
            return progress
        place, modality = torch.device(device), find_modality(config)
        scorer = Scorer.build(config.rewards, [], place, modality)
        prompts = load_prompts(config.data.train, images=modality.takes_images)
        check_images(prompts)
        scorer.preload()
        policy = load_policy(config, place)
        policy.validate_prompts(prompts)
        source = PolicyRollouts(config, policy, scorer, prompts, place)
        barren = 0
        with phase("rows", count, progress.pairs) as shown:
            while progress.pairs < count:
                scored = source.draw(progress.steps, 0, range(config.groups), lambda part: None)
                new, progress = _select_rows(
                    scored, folder, replace(progress, steps=progress.steps + 1), selection, modality
                )
                barren = 0 if new else barren + 1
                if barren == PATIENCE:
                    raise PairsError(
                        f"{PATIENCE} steps of {config.groups} groups gave no pair ({progress.ties} ties, {progress.unscored} "
                        "unscored groups so far); take a reward that tells these samples apart, a larger data.group_size, "
                        "or more noise (with --solved: a lower threshold)"
                    )
                rows += new
                shown.done = progress.pairs
                atomic_write_text(
                    folder / selection.file, "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)
                )
                state = {"made": asdict(progress), "settings": settings}
                atomic_write_text(folder / "progress.json", json.dumps(state))
        return progress


RECORDED_SECTIONS = {"seed", "model", "data", "rewards", "references", "rollout", "generation"}
"""Sections of a recipe on which the rows depend."""


def _read_folder(folder: Path, file: str, settings: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Progress]:
    """Return the rows that a folder holds, and its progress. PairsError: they were made otherwise."""
    saved, rows = folder / "progress.json", folder / file
    if not saved.exists():
        if rows.exists():
            raise PairsError(f"{rows} exists and was not made here; choose another folder with --out")
        return [], Progress()
    state = json.loads(saved.read_text())
    different = sorted(name for name, value in settings.items() if state["settings"].get(name) != value)
    if different:
        raise PairsError(
            f"{folder} was begun with other settings of {', '.join(different)}; give the same, or another folder with --out"
        )
    progress = Progress(**state["made"])
    # The rows are written before the progress: those of a step that was not finished are drawn again.
    lines = rows.read_text(encoding="utf-8").splitlines()[: progress.pairs]
    return [json.loads(line) for line in lines], progress


def _select_rows(
    scored: ScoredRollout, folder: Path, progress: Progress, selection: Selection, modality: Modality
) -> tuple[list[dict[str, Any]], Progress]:
    """Return the rows of a step, and the progress after it. Images go into the folder."""
    rows: list[dict[str, Any]] = []
    filled = torch.tensor(modality.filled(scored.rollout.content), device=scored.valid.device)
    candidates = selection.candidates(scored.valid, filled)
    for group in scored.groups.unique().tolist():
        members = ((scored.groups == group) & candidates).nonzero().flatten().tolist()
        if len(members) < 2:
            progress = replace(progress, unscored=progress.unscored + 1)
            continue
        selected = selection(scored.rewards[members], modality.key)
        picked = [{key: members[i] for key, i in row.items()} for row in selected]
        picked = [row for row in picked if filled[list(row.values())].all()]
        progress = replace(progress, pairs=progress.pairs + len(picked), ties=progress.ties + (not picked))
        for number, row in enumerate(picked):
            stem = f"{progress.steps:06d}-{group:03d}" + (f"-{number}" if number else "")
            rows.append(_build_row(scored, row, modality, folder, stem))
    return rows, progress


def _build_row(
    scored: ScoredRollout, picked: Mapping[str, int], modality: Modality, folder: Path, stem: str
) -> dict[str, Any]:
    """Return a row of the file; picked: key -> number of the sample in the step. An image is saved under `stem`."""
    content, prompt = scored.rollout.content, scored.rollout.prompts[next(iter(picked.values()))]
    samples = {key: modality.write(content[i : i + 1], folder, f"{stem}-{key}") for key, i in picked.items()}
    rewards = {"reward": float(scored.rewards[picked[modality.key]])} if modality.key in picked else {}
    negative = {} if prompt.negative is None else {"negative": prompt.negative}
    given = {key: _copy_input(path, folder) for key, path in prompt.files.items()}
    if IMAGE in given and modality.key in picked:
        given[INPUT_IMAGE] = given.pop(IMAGE)
    return {"prompt": prompt.text, **given, **samples, **rewards, "metadata": dict(prompt.metadata), **negative}


def _copy_input(image: Path, folder: Path) -> str:
    """Copy an input image into the folder, once for all rows, and return its value in a row."""
    copy = Path("inputs") / f"{digest_file(image)[:16]}{image.suffix}"
    if not (folder / copy).exists():
        (folder / copy).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / copy) as aside:
            shutil.copyfile(image, aside)
    return copy.as_posix()
