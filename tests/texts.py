"""Short runs of a language model for tests: a reward, prompts in a file, a recipe with evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from difrl.config import RunConfig

PROMPTS = [f"{a}+{b}=" for a in range(3) for b in range(2)]


@dataclass
class Ones:
    """Number of ones in a text. None for prompts that begin with one of `unscorable`."""

    unscorable: str = ""
    name: str = "ones"
    needs: ClassVar[tuple[str, ...]] = ("texts", "prompts")

    def __call__(
        self, texts: Sequence[str], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        rows = zip(texts, prompts, strict=True)
        return [None if prompt[0] in self.unscorable else float(text.count("1")) for text, prompt in rows]

    def to(self, device: torch.device | str) -> Ones:
        return self


def prompt_file(folder: Path, prompts: Sequence[str] = PROMPTS) -> Path:
    """Write prompts.txt with one prompt per line."""
    path = folder / "prompts.txt"
    path.write_text("\n".join(prompts), encoding="utf-8")
    return path


def shown_recipe(path: Path | str, folder: Path | str, prompts: Path | str, /, **sections: Any) -> RunConfig:
    """Return a run of a few steps of a language model. A mapping for a section is merged into the default section."""
    base: dict[str, Any] = {
        "output_dir": Path(folder),
        "model": {"path": str(path), "train": "full"},
        "data": {"train": str(prompts), "evaluation": str(prompts), "prompts_per_step": 2, "group_size": 3},
        "rewards": [{"import": "tests.texts:Ones"}],
        "generation": {"max_new_tokens": 5},
        "likelihood": {"kind": "tokens"},
        "objective": {"kind": "clipped"},
        "train": {"steps": 2, "lr": 1e-2, "micro_batch": 64, "threads": 1},
        "eval": {"every": 2, "images": 6, "show": 2, "columns": 2, "rlg": []},
    }
    merged = {n: {**base[n], **s} if isinstance(base.get(n), dict) else s for n, s in sections.items()}
    return RunConfig.model_validate(base | merged)
