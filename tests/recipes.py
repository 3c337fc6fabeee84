"""Recipes for tests: a small valid run, with any key changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difrl.config import RunConfig
from difrl.data.modality import find_modality
from difrl.data.prompts import Prompt, load_prompts
from difrl.data.recorded_samples import load_recorded_samples

AWM: Mapping[str, Any] = {
    "likelihood": {"kind": "forward", "decisions": 3},
    "objective": {"kind": "clipped", "clip_low": None, "clip_high": None},
}
FLOW_GRPO: Mapping[str, Any] = {
    "likelihood": {"kind": "reverse"},
    "objective": {"kind": "clipped", "clip_low": 0.1, "clip_high": 0.1},
    "rollout": {"kernel": "flow_sde", "noise_level": 0.7},
}
TEACHER: Mapping[str, Any] = {"teachers": {"teacher": {"path": "tiny-lm"}}}
NAMED: Mapping[str, Mapping[str, Any]] = {
    "g_opd": TEACHER,
    "vopd": TEACHER,
    "dph_rl": {"rehearsal": {"train": "samples.jsonl"}},
}
"""Keys that the recipe of a preset needs beside its task."""


def recipe(path: Path | str, folder: Path | str = "runs/test", /, **sections: Mapping[str, Any] | Any) -> RunConfig:
    """Return a run of a few steps on the shapes prompts. A mapping for a section is merged into the default section."""
    return _run(path, folder, {"rollout": {"steps": 4, "batch": 5}, **AWM}, sections)


def text_recipe(
    path: Path | str, folder: Path | str = "runs/test", /, **sections: Mapping[str, Any] | Any
) -> RunConfig:
    """Return a run of a language model with completions of at most five tokens."""
    own = {
        "data": {"train": "prompts.txt", "prompts_per_step": 4, "group_size": 3},
        "rollout": {"batch": 5},
        "rewards": [{"import": "tests.fakes:Ones"}],
        "train": {"steps": 3, "lr": 1e-3, "micro_batch": 60, "threads": 1},
        "generation": {"max_new_tokens": 5},
        "likelihood": {"kind": "tokens"},
        "objective": {"kind": "clipped", "clip_low": None, "clip_high": None},
    }
    return _run(path, folder, own, sections)


def _run(path: Path | str, folder: Path | str, own: Mapping[str, Any], sections: Mapping[str, Any]) -> RunConfig:
    base: dict[str, Any] = {
        "output_dir": Path(folder),
        "model": {"path": str(path), "train": "full"},
        "data": {"train": "shapes:train", "evaluation": "shapes:eval", "prompts_per_step": 4, "group_size": 3},
        "rewards": [{"name": "jpeg_compressibility"}],
        "train": {"steps": 3, "lr": 1e-3, "micro_batch": 7, "threads": 1},
        "eval": {"every": 2, "images": 8, "show": 2, "columns": 2, "rlg": []},
        "checkpoint": {"every": 1, "keep": 2},
        **own,
    }
    for name, section in sections.items():
        old = base.get(name)
        replaced = isinstance(section, Mapping) and isinstance(old, dict) and "kind" not in section
        base[name] = {**old, **section} if replaced else section  # type: ignore[dict-item]
    return RunConfig.model_validate(base)


def load_training_prompts(config: RunConfig) -> list[Prompt]:
    """Load the prompts that a run is trained on, from a file of prompts or of recorded samples."""
    if config.data.rows == "prompts":
        return load_prompts(config.data.train)
    return [group.prompt for group in load_recorded_samples(config.data, find_modality(config))]
