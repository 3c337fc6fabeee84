"""A hint where the rewards of the first steps give nothing to learn from.

A reward that reads the wrong key of the metadata, or cannot read these samples, often returns one number for all of them. A
sparse reward of 0 or 1 does the same until the first success. So the hint waits for STEPS steps and SAMPLES samples: if one
sample in a hundred succeeds, 256 samples without a success have a probability of 0.99^256 = 8 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from difrl.config import RunConfig
from difrl.reporting.number_format import number, pluralise

STEPS = 5
SAMPLES = 256


@dataclass
class SignalWatch:
    """The first steps of a run, as far as no group had two different rewards."""

    config: RunConfig
    steps: int = 0
    rewards: dict[str, list[float]] = field(default_factory=dict)
    """Mean of each optimised reward in every step."""

    def __post_init__(self) -> None:
        config = self.config
        self.due = max(STEPS, math.ceil(SAMPLES / (config.data.prompts_per_step * config.data.group_size)))
        """Number of steps after which the hint is given."""
        optimised = [reward.column for reward in config.rewards if not reward.silent]
        self.columns = optimised if config.data.rows == "prompts" else []
        """Columns of the rewards. Without one, the run learns from something else, such as a teacher or recorded samples."""

    def observe(self, metrics: Mapping[str, float]) -> str:
        """Take the metrics of the next step. Return the hint after the step at which it is due, else ""."""
        if metrics.get("groups/zero_std", 0.0) < 1:
            self.columns = []  # there is a signal, and it needs no watch any more
        for column in self.columns:
            self.rewards.setdefault(column, []).append(metrics.get(column, math.nan))
        self.steps += 1
        return self._hint() if self.columns and self.steps == self.due else ""

    def _hint(self) -> str:
        """Return the hint, by whether all rewards were equal, or only those of a group."""
        if any(math.isnan(value) for values in self.rewards.values() for value in values):
            return ""
        count = self.steps * self.config.data.prompts_per_step * self.config.data.group_size
        name = self.columns[0].partition("/")[2]
        seen = f"no signal to learn from in the first {self.steps} steps ({pluralise(count, 'sample')}): "
        if all(math.isclose(value, values[0], rel_tol=1e-6) for values in self.rewards.values() for value in values):
            found = ", ".join(f"{column} {number(values[0])}" for column, values in self.rewards.items())
            return (
                f"{seen}every sample has the same reward ({found}). The reward may look for a key that the metadata do not "
                f"have, or not be able to read these samples (`difrl rewards {name}` lists what it reads); or a success is "
                f"still rarer than about one in {count // 3}. Look at the samples in {self.config.output_dir / 'samples'}"
            )
        if self.config.advantage.baseline == "none":  # samples are not compared with their group
            return ""
        return (
            f"{seen}the rewards differ between prompts and never within a group, whose samples are compared. The reward may "
            "depend on the prompt alone, or the samples of a prompt may be equal: more noise, a higher temperature or a larger "
            f"data.group_size (now {self.config.data.group_size}) makes them differ"
        )
