"""GPUs on which a recipe fits, with settings that save memory where they are needed.

A ladder of settings is climbed until the peak fits. A rung keeps the settings of those before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from difrl.config import RunConfig
from difrl.config.checks import find_conflicts
from difrl.training.cost.memory import MemoryCounts

GIGABYTES = (16, 24, 48, 80, 141)
"""Memory of a GPU."""
PROCESSES = (1, 2, 4, 8)
CONTEXT = 0.75 * 2**30
"""Bytes that a CUDA context takes with the kernels and workspaces of its libraries (0.4 to 0.8 GiB)."""
RESERVE = 1.06
"""Memory that torch's allocator reserves over the peak of what is allocated, since its blocks do not fit exactly."""


@dataclass(frozen=True, eq=False)
class Rung:
    """Settings that save memory."""

    name: str
    values: Mapping[tuple[str, str], Any]
    """Section and key -> value."""
    replaces: Sequence[Any] = ()
    """Values that give way. Others save more, and stay."""

    def apply(self, config: RunConfig) -> RunConfig:
        """Return the recipe with these settings."""
        for (name, key), value in self.values.items():
            section = getattr(config, name)
            if not self.replaces or getattr(section, key) in self.replaces:
                config = config.model_copy(update={name: section.model_copy(update={key: value})})
        return config


AS_IT_IS = "as it is"
LADDER = (
    Rung(AS_IT_IS, {}),
    Rung("checkpointing", {("model", "gradient_checkpointing"): True}),
    Rung("one at a time", {("train", "micro_batch"): 1, ("rollout", "batch"): 1}),
    Rung("bfloat16", {("model", "dtype"): "bfloat16"}),
    Rung("copies: cpu", {("model", "copies"): "cpu"}),
    Rung("adamw8bit", {("train", "optimizer"): "adamw8bit"}, ("adamw", "paged_adamw", "lion")),
    Rung("shard gradients", {("model", "shard"): "gradients"}, ("none",)),
    Rung("shard weights", {("model", "shard"): "weights"}, ("none", "gradients")),
    Rung("int8", {("model", "shard"): "none", ("model", "quantize"): "int8"}, ("none", "gradients", "weights")),
    Rung("nf4", {("model", "quantize"): "nf4"}, ("int8", "float8")),
)
"""The first rung that fits is the cheapest: those that cost neither time nor precision come first."""


@dataclass(frozen=True)
class Fit:
    """The first rung with which a recipe fits on some GPUs."""

    rung: Rung
    config: RunConfig
    peak: int
    """Bytes of a process, without its context and what the allocator reserves."""


def find_fit(counts: MemoryCounts, config: RunConfig, processes: int, gigabytes: float) -> Fit | None:
    """Return the first rung with which a recipe fits on some GPUs of a size; None if none does."""
    room = (gigabytes * 2**30 - CONTEXT) / RESERVE
    for rung in LADDER:
        changed = rung.apply(config)
        sharded = changed.model.shard != "none" and config.model.shard == "none"
        if find_conflicts(changed) or (sharded and processes == 1):
            continue
        config = changed
        peak = counts.count(config, processes).peak
        if peak <= room:
            return Fit(rung, config, peak)
    return None


def find_fits(counts: MemoryCounts, config: RunConfig) -> dict[tuple[int, int], Fit | None]:
    """Return the fit for every size of GPU and number of them: (gigabytes, processes) -> fit."""
    return {(size, n): find_fit(counts, config, n, size) for size in GIGABYTES for n in PROCESSES}


def describe_changes(recipe: RunConfig, config: RunConfig) -> str:
    """Return the settings of a config that differ from those of a recipe, as overrides."""
    keys = dict.fromkeys(key for rung in LADDER for key in rung.values)
    values = {key: [getattr(getattr(c, key[0]), key[1]) for c in (recipe, config)] for key in keys}
    return " ".join(f"{a}.{b}={str(new).lower()}" for (a, b), (old, new) in values.items() if old != new)
