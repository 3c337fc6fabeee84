"""Number of model evaluations of a run, counted in a dry run.

The real trainer takes steps with the real policy of the recipe, over a model that is one number. So the counts are those of
the code that trains, and no weights are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difrl.config import RunConfig
from difrl.policies.base import TRAINED, GuidanceSettings, NoiseKey, Policy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.evaluation import samples_due
from difrl.training.inputs import Inputs
from difrl.training.trainer import Trainer
from rewards.base import Metadata, Scores, WithoutDevice, all_valid

WITHOUT_WEIGHTS: Mapping[str, Mapping[str, Any]] = {
    "model": {"train": "full", "dtype": "float32", "gradient_checkpointing": False},
    "rollout": {"precision": "same"},
    "generation": {"engine": "transformers", "chat": None, "system": None, "eos": None, "pad": None},
    "collect": {"max_draws": 1, "by": None},
    "eval": {"diversity": []},
}
"""Settings of a dry run: nothing in them needs weights or other programs, and the first draw is enough."""


@dataclass(frozen=True)
class Evaluations:
    """Evaluations of the denoiser on single samples, over all processes; for text, tokens that pass through the model.

    One output under guidance takes two.
    """

    rollout: int
    """Evaluations of one draw of a step's samples."""
    gradient: int
    """Evaluations of a step with gradient: the likelihoods of θ."""
    without_gradient: int
    """Evaluations of a step without gradient: old weights, anchors, and statistics over micro-batches."""
    evaluation: int
    """Evaluations of the run for evaluation prompts, sample grids and the RLG sweep, without the pictures at its end."""
    draws: int
    """Most draws of a step (collect.max_draws)."""
    steps: int
    check: int = 0
    """Evaluations of a step for the first-update check. `nfe` leaves them out."""
    reference_samples: int = 0
    """Most evaluations of the run for the reference samples of rewards. The run's `nfe` leaves them out."""

    @property
    def step(self) -> int:
        """Evaluations of a step whose first draw is enough: the increase of `nfe` in metrics.jsonl."""
        return self.rollout + self.gradient + self.without_gradient

    @property
    def run(self) -> int:
        """Evaluations of all steps: the last `nfe`."""
        return self.steps * self.step


@dataclass
class Tally:
    """Samples that passed through the model of a dry run."""

    gradient: int = 0
    """Number with gradient, in all."""
    together: int = 0
    """Largest number with gradient in one pass."""
    drawn: int = 0
    """Largest number of texts in one draw."""

    def add(self, samples: int) -> None:
        """Count a pass, if it has a gradient."""
        if torch.is_grad_enabled():
            self.gradient += samples
            self.together = max(self.together, samples)


@dataclass(frozen=True)
class DryPolicy:
    """The policy of a recipe over a model that is one number."""

    policy: Policy
    tally: Tally
    steps: Mapping[int, int]
    """Training steps to take -> number of steps of the run with as many evaluations."""
    length: int = 1
    """Evaluations, or tokens, of a pass of one training sample."""
    evaluation_length: float = 1
    """The same of one evaluation sample."""


def dry_config(config: RunConfig) -> RunConfig:
    """Return the recipe of a dry run."""
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in WITHOUT_WEIGHTS.items()}
    rewards = [reward.model_copy(update={"shape": None, "ensemble": None}) for reward in config.rewards]
    return config.model_copy(update={**sections, "rewards": rewards, "watch": [], "references": None})


def count_evaluations(config: RunConfig, dry: DryPolicy, inputs: Inputs, processes: int) -> Evaluations:
    """Take the steps of a dry run, and return the number of evaluations of the whole run."""
    policy, tally, total = dry.policy, dry.tally, config.train.steps
    scorer = Scorer.from_rewards({reward.label: (_Alternating(), 1.0) for reward in config.rewards}, {})
    trainer = Trainer(dry_config(config), policy, scorer, inputs.train, AlikeProcesses(processes))

    rollout = gradient = step = check = 0.0
    for number, like in dry.steps.items():
        groups, share = range(0, config.groups, processes), processes * like / total
        rollout += share * _spent(policy, trainer.source.draw, number, 0, groups, lambda part: None, {})
        tally.gradient = 0
        step += share * _spent(policy, trainer.step, number)
        gradient += share * tally.gradient
        check += share * trainer.check_evaluations
    reference_samples = 0
    if config.references is not None:
        met = min(total * config.collect.max_draws * config.data.prompts_per_step, processes * len(inputs.train))
        one, key = torch.zeros(1, dtype=torch.int64), NoiseKey(0, 0)
        cost = _spent(policy, policy.reference, inputs.train[:1], one, key, config.references.snapshot)
        reference_samples = config.references.count * met * cost
    return Evaluations(
        rollout=round(rollout) * dry.length,
        gradient=round(gradient) * dry.length,
        without_gradient=round(step - rollout - gradient) * dry.length,
        evaluation=round(_count_evaluation(config, policy, inputs, processes) * dry.evaluation_length),
        draws=config.collect.max_draws,
        steps=total,
        check=round(check) * dry.length,
        reference_samples=reference_samples * dry.length,
    )


def _count_evaluation(config: RunConfig, policy: Policy, inputs: Inputs, processes: int) -> int:
    """Return the evaluations for evaluation prompts, sample grids and the RLG sweep of the whole run."""
    settings, prompts = config.eval, inputs.evaluation
    sizes = [size for done in range(config.train.steps + 1) if prompts and (size := samples_due(config, done))]
    if not sizes:
        return 0
    grids = len(sizes) * min(settings.show, len(prompts)) * settings.columns
    draws = [
        (TRAINED, sum(sizes) + grids),
        *((GuidanceSettings(w, measure=True), settings.images) for w in settings.rlg),
    ]
    batch = min(config.rollout.batch, math.ceil(max(sizes) / processes))
    batches = [[prompts[0]] * batch, torch.arange(batch), NoiseKey(0, 0, "eval")]
    return sum(samples * _spent(policy, policy.evaluation, *batches, guidance) // batch for guidance, samples in draws)


def _spent(policy: Policy, work: Callable[..., object], *arguments: object) -> int:
    before = policy.evaluations
    work(*arguments)
    return policy.evaluations - before


class _Alternating(WithoutDevice):
    """A reward of 0 and 1 in turn, so that every group has different rewards."""

    name = "alternating"
    needs = ()

    def __call__(self, samples: Any, prompts: Sequence[str], metadata: Metadata) -> Scores:
        return all_valid(torch.arange(len(prompts)) % 2.0)


class AlikeProcesses(DistributedContext):
    """One of several processes that all do the same."""

    device = torch.device("cpu")
    count = 1
    rank = 0

    def __init__(self, count: int) -> None:
        self.count = count

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.repeat(self.count, *[1] * (tensor.dim() - 1))

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor * self.count
