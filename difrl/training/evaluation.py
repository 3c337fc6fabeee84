"""Evaluation on fixed prompts: rewards, watched rewards and diversity, each with its standard error.

Sample i has the same prompt and the same noise in every evaluation with the same number of images, so their differences are
paired. An evaluation of another size draws other samples of the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from difrl.config import RunConfig
from difrl.core.groups import mean_and_stderr
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.policies.base import TRAINED, GuidanceSettings, NoiseKey, Policy
from difrl.policies.snapshots import BASE, CURRENT
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.progress import phase
from difrl.scoring import Scorer
from difrl.scoring.diversity import Diversity, mean_distances
from samplers import stable_seed


def samples_due(config: RunConfig, step: int) -> int:
    """Return the number of samples of the evaluation after `step` steps, 0 where none is due."""
    settings = config.eval
    if config.data.evaluation is None or settings.every == 0:
        return 0
    if step in (0, config.train.steps):
        return settings.final_images or settings.images
    return 0 if step % settings.every else settings.images


@dataclass(frozen=True)
class Evaluator:
    """Evaluation of a policy on fixed prompts."""

    policy: Policy
    scorer: Scorer
    prompts: Sequence[Prompt]
    processes: DistributedContext
    seed: int
    diversity: Diversity = field(default_factory=Diversity)
    snapshot: str = CURRENT
    """Weights that are evaluated."""

    def __call__(self, images: int, guidance: GuidanceSettings = TRAINED) -> dict[str, float]:
        """Return means and standard errors over `images` samples, whose prompts take turns, as eval/… metrics."""
        count = self.processes.count
        # Every process draws equally many. Numbers past the end repeat the last sample and are dropped below.
        numbers = torch.arange(self.processes.rank, math.ceil(images / count) * count, count).clamp(max=images - 1)
        in_use = self._prompts_in_use(images)
        prompts = [in_use[int(i) % len(in_use)] for i in numbers]
        with phase("evaluation", total=len(prompts)):
            rollout = self._draw(prompts, numbers, NoiseKey(self.seed, 0, "eval"), guidance)
            rollout = rollout.to(self.processes.device)
            with self.processes.fail_together():
                scored = self.scorer(rollout)
        columns = {"reward/mean": torch.where(scored.valid, scored.rewards, torch.nan), **scored.parts}
        if guidance.measure:
            columns |= rollout.measures
        order = self._order(numbers.to(self.processes.device), images)
        metrics: dict[str, float] = {}
        for name, column in columns.items():
            mean, stderr = mean_and_stderr(self.processes.gather(column)[order])
            metrics[f"eval/{name}"], metrics[f"eval/{name}/stderr"] = mean, stderr
        return {**metrics, **self._diversity(rollout, order)}

    def _prompts_in_use(self, images: int) -> Sequence[Prompt]:
        """Return all prompts, or, if none would have two samples, half as many prompts as images: diversity needs two.

        The choice is random, since files are often sorted by kind, and the same in all evaluations.
        """
        if images > len(self.prompts):
            return self.prompts
        generator = torch.Generator().manual_seed(stable_seed("evaluation prompts"))
        order = torch.randperm(len(self.prompts), generator=generator)[: max(1, images // 2)]
        return [self.prompts[int(i)] for i in order]

    def _order(self, numbers: Tensor, images: int) -> Tensor:
        """Return the positions of samples 0, 1, … in the gathered rows."""
        gathered = self.processes.gather(numbers)
        order = torch.argsort(gathered, stable=True)
        first = torch.ones(len(order), dtype=torch.bool, device=order.device)
        first[1:] = gathered[order][1:] != gathered[order][:-1]
        return order[first][:images]

    def _diversity(self, rollout: Rollout, order: Tensor) -> dict[str, float]:
        groups = torch.arange(len(order), device=order.device) % len(self._prompts_in_use(len(order)))
        metrics: dict[str, float] = {}
        for name, features in self.diversity.describe(rollout).items():
            mean, stderr = mean_and_stderr(mean_distances(self.processes.gather(features)[order], groups))
            if not math.isnan(mean):
                metrics |= {f"eval/{name}": mean, f"eval/{name}/stderr": stderr}
        return metrics

    def prompts_of(self, images: Iterable[int], grids: Iterable[int]) -> list[Prompt]:
        """Return the prompts of evaluations and of grids of these sizes, with repetitions."""
        return [p for count in images for p in self._prompts_in_use(count)] + [p for n in grids for p in self._shown(n)]

    def _shown(self, count: int) -> list[Prompt]:
        """Return `count` prompts spread over the evaluation set, or all."""
        count = min(count, len(self.prompts))
        return [self.prompts[i * len(self.prompts) // count] for i in range(count)]

    def draw_grid(self, count: int, columns: int, guidance: GuidanceSettings = TRAINED) -> tuple[Rollout, list[str]]:
        """Draw the fixed grid: `columns` samples for each of `count` prompts spread over the evaluation set.

        Return the samples and the texts of the prompts. All processes draw it, since weights may be sharded.
        """
        chosen = self._shown(count)
        prompts = [p for p in chosen for _ in range(columns)]
        with phase("samples to show", total=len(prompts)):
            numbers, key = torch.arange(len(prompts)), NoiseKey(self.seed, 0, "show")
            rollout = self._draw(prompts, numbers, key, guidance)
        return rollout, [p.text for p in chosen]

    def _draw(self, prompts: Sequence[Prompt], numbers: Tensor, key: NoiseKey, guidance: GuidanceSettings) -> Rollout:
        names = [self.snapshot, *([BASE] if guidance.evaluates_base else [])]
        with (
            self.policy.drawing(*names, alike=guidance.adaptive is None),
            self.policy.snapshots.as_current(self.snapshot),
        ):
            return self.policy.evaluation(prompts, numbers, key, guidance)
