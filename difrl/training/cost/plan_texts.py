"""How many tokens a language model reads and writes in a run, counted as the policy and the trainer spend them.

Completions may end early, so every number is what it is at most; prompts count with their mean length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from difrl.config import RunConfig
from difrl.policies.references import get_references, get_references_read, reward_anchors
from difrl.training.cost.plan_images import Evaluations, samples_compared, samples_evaluated
from difrl.training.microbatches import extent, self_contained


@dataclass(frozen=True)
class TextPlan:
    """Of a run whose prompts have so many tokens each."""

    config: RunConfig
    train: Sequence[int]
    """Tokens of every training prompt."""
    evaluation: Sequence[int]
    processes: int

    @property
    def samples(self) -> int:
        return self.config.data.prompts_per_step * self.config.data.group_size

    @property
    def share(self) -> int:
        """Samples of an update in a process."""
        return self.samples // self.processes // self.config.train.updates_per_step

    @property
    def written(self) -> int:
        """Tokens of a completion."""
        return self.config.generation.max_new_tokens

    @property
    def length(self) -> int:
        """Of a whole text, prompt and completion, in the mean over training prompts."""
        return round(sum(self.train) / len(self.train)) + self.written

    @property
    def longest(self) -> int:
        return max(self.train) + self.written

    @property
    def together(self) -> int:
        """Samples of a micro-batch, whose activations are alive at once."""
        config = self.config
        objective = config.objective.build(config.likelihood)
        part = extent(objective, self.written, config.train.micro_batch, config.compared, whole=True)
        return min(part.rows, self.share)

    @property
    def drawn_together(self) -> int:
        """Completions that are written at once, each with its keys and values."""
        return min(self.config.rollout.batch, math.ceil(self.samples / self.processes))

    def evaluations(self) -> Evaluations:
        """In tokens that pass through the model."""
        config = self.config
        texts, again = self.samples * self.length, self._rehearsed * self.length
        drawn = config.data.rows == "prompts"
        named, charged = get_references(config).values(), reward_anchors(config).values()
        # What centres anchors is one pass for all of them, by the weights that drew.
        own = sum(r.samples == "own" for r in named) + len(charged) + any(r.centred for r in charged) + self._statistics
        rehearsed = sum(r.samples == "rehearsal" for r in named)
        mean = sum(self.evaluation) / max(1, len(self.evaluation))
        return Evaluations(
            rollout=texts * (1 + self._scored_again) if drawn else 0,
            gradient=texts + again,
            references=own * texts + rehearsed * again,
            evaluation=round(samples_evaluated(config, len(self.evaluation)) * (mean + self.written)),
            draws=config.collect.max_draws,
            steps=config.train.steps,
            compared=samples_compared(config, len(self.train), self.processes) * self.length,
        )

    @property
    def generated(self) -> int:
        """Tokens of a step's completions, which the run counts as nfe."""
        return self.samples * self.written if self.config.data.rows == "prompts" else 0

    @property
    def _rehearsed(self) -> int:
        """Texts of a file that a step evaluates besides, taken to be as long as its own."""
        rehearsal = self.config.rehearsal
        return 0 if rehearsal is None else rehearsal.prompts_per_step * rehearsal.group_size

    @property
    def _scored_again(self) -> bool:
        """Whether the network scores every text that it has not drawn itself."""
        return self.config.generation.engine != "transformers"

    @property
    def _statistics(self) -> int:
        """Passes over the samples for what the objective must know of whole groups."""
        objective, size = self.config.objective.build(self.config.likelihood), self.config.compared
        part = extent(objective, self.written, self.config.train.micro_batch, size, whole=True)
        if self_contained(objective, torch.arange(self.share) // size, part):
            return 0
        return 1 + len(get_references_read(objective) & set(get_references(self.config)))
