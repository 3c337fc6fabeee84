"""Recipes of a random language model, and a reward of its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from difrl.config import RunConfig


def recipe(model: Path, /, **sections: Any) -> RunConfig:
    """Return a tokens recipe with eight samples of each of two prompts; sections are merged into it, one level deep."""
    said: dict[str, Any] = {
        "seed": 0,
        "model": {"path": str(model), "train": "full"},
        "data": {"train": str(model / "prompts.txt"), "prompts_per_step": 2, "group_size": 8},
        "rewards": [{"import": "tests.policies.language.threes:Threes"}],
        "generation": {"max_new_tokens": 6},
        "likelihood": {"kind": "tokens"},
        "objective": {"kind": "clipped"},
        "train": {"steps": 2, "lr": 1.0e-2},
        "eval": {"every": 0},
    }
    for name, section in sections.items():
        said[name] = {**said[name], **section} if isinstance(section, dict) and name in said else section
    return RunConfig.model_validate(said)


class Threes:
    """The number of threes in a completion."""

    name, needs = "threes", ("texts",)

    def __call__(self, texts: Any, prompts: Any, metadata: Any) -> Any:
        from rewards import Scores

        values = torch.tensor([float(text.count("3")) for text in texts])
        return Scores(values, torch.ones(len(texts), dtype=torch.bool))

    def to(self, device: Any) -> Threes:
        return self
