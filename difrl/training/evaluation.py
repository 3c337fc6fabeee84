"""What is measured on evaluation prompts: rewards, watched rewards and diversity, each with its standard error.

Sample number i has the same prompt and the same noise in every evaluation of as many images, so differences between these
are paired. Evaluations of another size are other samples of the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from difrl.config import RunConfig
from difrl.core.groups import mean_and_stderr
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.policies.base import TRAINED, GuidanceSettings, NoiseKey, Policy
from difrl.runtime.distributed import DistributedContext
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
    """Evaluates a policy on fixed prompts."""

    policy: Policy
    scorer: Scorer
    prompts: Sequence[Prompt]
    processes: DistributedContext
    seed: int
    diversity: Diversity = field(default_factory=Diversity)

    def __call__(self, images: int, steering: GuidanceSettings = TRAINED) -> dict[str, float]:
        """Means and standard errors over `images` samples, prompt after prompt in turn, as eval/… metrics."""
        count = self.processes.count
        # Every process draws equally many; numbers past the end repeat the last sample and are dropped below.
        numbers = torch.arange(self.processes.rank, math.ceil(images / count) * count, count).clamp(max=images - 1)
        asked = self._asked(images)
        prompts = [asked[int(i) % len(asked)] for i in numbers]
        rollout = self.policy.evaluation(prompts, numbers, NoiseKey(self.seed, 0, "eval"), steering)
        rollout = rollout.to(self.processes.device)
        with self.processes.fail_together():
            scored = self.scorer(rollout)
        columns = {"reward/mean": torch.where(scored.valid, scored.rewards, torch.nan), **scored.parts}
        if steering.measure:
            columns |= rollout.measures
        order = self._order(numbers.to(self.processes.device), images)
        metrics: dict[str, float] = {}
        for name, column in columns.items():
            mean, stderr = mean_and_stderr(self.processes.gather(column)[order])
            metrics[f"eval/{name}"], metrics[f"eval/{name}/stderr"] = mean, stderr
        return {**metrics, **self._diversity(rollout, numbers, order)}

    def _asked(self, images: int) -> Sequence[Prompt]:
        """Every prompt; where none could come twice, half as many as there are images, so that diversity can be measured.

        They are drawn once for all evaluations: files are often sorted by kind.
        """
        if images > len(self.prompts):
            return self.prompts
        generator = torch.Generator().manual_seed(stable_seed("evaluation prompts"))
        chosen = torch.randperm(len(self.prompts), generator=generator)[: max(1, images // 2)]
        return [self.prompts[int(i)] for i in chosen]

    def _order(self, numbers: Tensor, images: int) -> Tensor:
        """Where in the gathered rows samples 0, 1, … are."""
        gathered = self.processes.gather(numbers)
        order = torch.argsort(gathered, stable=True)
        first = torch.ones(len(order), dtype=torch.bool, device=order.device)
        first[1:] = gathered[order][1:] != gathered[order][:-1]
        return order[first][:images]

    def _diversity(self, rollout: Rollout, numbers: Tensor, order: Tensor) -> dict[str, float]:
        groups = torch.arange(len(order), device=order.device) % len(self._asked(len(order)))
        metrics: dict[str, float] = {}
        for name, features in self.diversity.describe(rollout).items():
            mean, stderr = mean_and_stderr(mean_distances(self.processes.gather(features)[order], groups))
            if not math.isnan(mean):
                metrics |= {f"eval/{name}": mean, f"eval/{name}/stderr": stderr}
        return metrics

    def show(self, count: int, columns: int, steering: GuidanceSettings = TRAINED) -> tuple[Rollout, list[str]]:
        """The samples of the fixed grid: `columns` for each of `count` prompts spread over the evaluation set."""
        count = min(count, len(self.prompts))
        chosen = [self.prompts[i * len(self.prompts) // count] for i in range(count)]
        prompts = [p for p in chosen for _ in range(columns)]
        rollout = self.policy.evaluation(prompts, torch.arange(len(prompts)), NoiseKey(self.seed, 0, "show"), steering)
        return rollout, [p.text for p in chosen]
