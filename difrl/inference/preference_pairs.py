"""`difrl pairs`: a file of samples made by a model and rewards.

A group is drawn for each prompt, as training draws it, and scored. What is kept of it:

* pairs: its best and its worst sample; groups without a difference in reward give none,
* solved: all its samples, if their mean reward is high enough: what a rehearsal reads (DPH-RL, arXiv:2509.07430).

    FOLDER/  pairs.jsonl or samples.jsonl (as data.rows reads them)  images/ (texts are in the rows)  progress.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from difrl.config import RunConfig
from difrl.config.load import ConfigError
from difrl.data.modality import MODALITIES, Modality
from difrl.data.prompts import load_prompts
from difrl.data.rollout import ScoredRollout
from difrl.policies.load import load_policy
from difrl.runtime.errors import UserError
from difrl.runtime.files import atomic_write_text
from difrl.scoring import Scorer
from difrl.training.rollout_source import PolicyRollouts

PATIENCE = 20
"""Steps in a row that may give nothing."""


class PairsError(UserError):
    """A file that cannot be made, or a folder that holds something else."""


@dataclass(frozen=True)
class Made:
    """What a folder holds, and what it took."""

    pairs: int = 0
    """Rows: pairs, or samples of solved groups."""
    ties: int = 0
    """Groups of which nothing was kept: all rewards equal, or too low; or only empty texts."""
    unscored: int = 0
    """Groups of which fewer than two samples could be judged. No row is written of an empty text."""
    steps: int = 0


class Keep(Protocol):
    """What is kept of a group."""

    @property
    def file(self) -> str:
        """The name of the file it goes into."""

    def judged(self, valid: Tensor, filled: Tensor) -> Tensor:
        """Which samples [B] it looks at, of those that could be scored, and of those that hold anything."""

    def __call__(self, rewards: Tensor, key: str) -> Sequence[Mapping[str, int]]:
        """Rewards [n] of a group's judged samples → rows: under which key stands which of them. key: that of a row of samples."""


@dataclass(frozen=True)
class BestAndWorst:
    """Preference pairs."""

    file: str = "pairs.jsonl"

    def judged(self, valid: Tensor, filled: Tensor) -> Tensor:
        return valid & filled

    def __call__(self, rewards: Tensor, key: str) -> Sequence[Mapping[str, int]]:
        if rewards.max() == rewards.min():
            return []
        return [{"chosen": int(rewards.argmax()), "rejected": int(rewards.argmin())}]


@dataclass(frozen=True)
class Solved:
    """All samples of a group whose mean reward is at least so high; empty texts count in the mean."""

    least: float
    file: str = "samples.jsonl"

    def judged(self, valid: Tensor, filled: Tensor) -> Tensor:
        return valid

    def __call__(self, rewards: Tensor, key: str) -> Sequence[Mapping[str, int]]:
        return [{key: i} for i in range(len(rewards))] if float(rewards.mean()) >= self.least else []


def make_pairs(
    config: RunConfig, folder: Path, count: int, device: torch.device | str = "cpu", keep: Keep = BestAndWorst()
) -> Made:
    """Draws whole steps until `folder` holds `count` rows or more; a killed run is continued, to the same rows."""
    if config.data.rows != "prompts":
        raise ConfigError(
            f"data.rows: pairs are made by sampling prompts, found {config.data.rows}; set data.rows: prompts"
        )
    place = torch.device(device)
    rows, made = _begun(folder, config, keep)
    if made.pairs >= count:
        return made
    scorer = Scorer.build(config.rewards, [], place)
    medium, barren = MODALITIES[config.likelihood.kind], 0
    scorer.check_modality(medium)
    prompts = load_prompts(config.data.train)
    policy = load_policy(config, place)
    policy.validate_prompts(prompts)
    source = PolicyRollouts(config, policy, scorer, prompts, place)
    while made.pairs < count:
        scored = source.draw(made.steps, 0, range(config.groups), lambda part: None)
        fresh, made = _kept(scored, folder, replace(made, steps=made.steps + 1), keep, medium)
        barren = 0 if fresh else barren + 1
        if barren == PATIENCE:
            raise PairsError(
                f"{PATIENCE} steps of {config.groups} groups gave no pair ({made.ties} ties, {made.unscored} unscored groups "
                "so far); take a reward that tells these samples apart, a larger data.group_size, or more noise (of solved "
                "groups: a lower threshold)"
            )
        rows += fresh
        _save(folder, rows, made, _settings(config, keep), keep.file)
    return made


def _kept(
    scored: ScoredRollout, folder: Path, made: Made, keep: Keep, medium: Modality
) -> tuple[list[dict[str, Any]], Made]:
    """The rows of a step, with what is not in them saved; and the counts after it."""
    rows: list[dict[str, Any]] = []
    filled = torch.tensor([not medium.is_empty(x) for x in scored.rollout.content], device=scored.valid.device)
    judged = keep.judged(scored.valid, filled)
    for group in scored.groups.unique().tolist():
        members = ((scored.groups == group) & judged).nonzero().flatten().tolist()
        if len(members) < 2:
            made = replace(made, unscored=made.unscored + 1)
            continue
        kept = [{key: members[i] for key, i in row.items()} for row in keep(scored.rewards[members], medium.key)]
        found = [row for row in kept if filled[list(row.values())].all()]
        made = replace(made, pairs=made.pairs + len(found), ties=made.ties + (not found))
        for number, chosen in enumerate(found):
            stem = f"{made.steps:06d}-{group:03d}" + (f"-{number}" if number else "")
            rows.append(_row(scored, chosen, medium, folder, stem))
    return rows, made


def _row(scored: ScoredRollout, chosen: Mapping[str, int], medium: Modality, folder: Path, stem: str) -> dict[str, Any]:
    """A row of a file in the folder: what stands under which key is told by its number in the step."""
    content, prompt = scored.rollout.content, scored.rollout.prompts[next(iter(chosen.values()))]
    told = {key: medium.write(content[i], folder, f"{stem}-{key}") for key, i in chosen.items()}
    rewards = {"reward": float(scored.rewards[chosen[medium.key]])} if medium.key in chosen else {}
    negative = {} if prompt.negative is None else {"negative": prompt.negative}
    return {"prompt": prompt.text, **told, **rewards, "metadata": dict(prompt.metadata), **negative}


def _settings(config: RunConfig, keep: Keep) -> dict[str, Any]:
    """What decides which rows are made."""
    kept = {"seed", "model", "data", "rewards", "references", "rollout", "generation"}
    return config.model_dump(mode="json", include=kept, exclude={"rollout": {"batch"}}) | {"keep": repr(keep)}


def _begun(folder: Path, config: RunConfig, keep: Keep) -> tuple[list[dict[str, Any]], Made]:
    progress, pairs = folder / "progress.json", folder / keep.file
    if not progress.exists():
        if folder.exists() and any(folder.iterdir()) and pairs.exists():
            raise PairsError(f"{pairs} exists and was not made here; choose another folder with --out")
        return [], Made()
    state = json.loads(progress.read_text())
    found: Mapping[str, Any] = state["settings"]
    different = sorted(name for name, value in _settings(config, keep).items() if found.get(name) != value)
    if different:
        raise PairsError(
            f"{folder} was begun with other settings of {', '.join(different)}; give the same, or another folder with --out"
        )
    made = Made(**state["made"])
    # The rows are written before the progress: those of a step that was not finished are drawn again.
    lines = pairs.read_text(encoding="utf-8").splitlines()[: made.pairs]
    return [json.loads(line) for line in lines], made


def _save(folder: Path, rows: list[dict[str, Any]], made: Made, settings: Mapping[str, Any], file: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / file, "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows))
    atomic_write_text(folder / "progress.json", json.dumps({"made": asdict(made), "settings": settings}))
