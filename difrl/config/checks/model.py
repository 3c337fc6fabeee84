"""Conflicts of the model and its adapter."""

from __future__ import annotations

from collections.abc import Iterator

from difrl.config.checks.conflict import ConfigConflict
from difrl.config.schema.run import RunSections


def check_model(config: RunSections) -> Iterator[ConfigConflict]:
    """Yield the conflicts of this part of a config."""
    if config.model.train == "full" and config.model.lora.warm_start is not None:
        problem = (
            "train: full trains all weights and has no adapter to continue from; remove warm_start, or set train: lora"
        )
        yield ConfigConflict(("model", "lora", "warm_start"), problem)
