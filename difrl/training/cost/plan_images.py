"""How many model evaluations a run of an image generator asks for, counted as the policy and the trainer spend them.

Left out, as in the run's own `nfe`: the handful of each step on which the ratio is checked to start at 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from difrl.config import RunConfig
from difrl.config.load import ConfigError
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.families import Family
from difrl.policies.diffusion.load import build_samplings, get_inversion_snapshots
from difrl.policies.diffusion.sampling import Sampling
from difrl.policies.references import Reference, get_references, get_references_read, reward_anchors
from difrl.policies.snapshots import CURRENT
from difrl.training.microbatches import extent, self_contained
from samplers import Condition, Window, counting, solve


@dataclass(frozen=True)
class Evaluations:
    """Evaluations of the denoiser on single samples, over all processes; guidance takes two for one output. For text:
    tokens that pass through the model."""

    rollout: int
    """Of one draw of a step's samples."""
    gradient: int
    """Of a step: the likelihoods of θ, which are differentiated."""
    references: int
    """Of a step: the same decisions under old weights and anchors, and what statistics over micro-batches take."""
    evaluation: int
    """Of the run: evaluation prompts, sample grids and the RLG sweep, but not its closing pictures."""
    draws: int
    """Draws of a step at most (collect.max_draws)."""
    steps: int
    compared: int = 0
    """Of the run at most: reference samples with which rewards are compared; the run's `nfe` leaves them out."""

    @property
    def step(self) -> int:
        """Of a step whose first draw is enough: what metrics.jsonl counts as nfe."""
        return self.rollout + self.gradient + self.references

    @property
    def run(self) -> int:
        """Of all steps, as `nfe` counts them: without evaluation."""
        return self.steps * self.step


@dataclass(frozen=True)
class Plan:
    """How many evaluations each part of a step asks for, as the policy and the trainer do."""

    config: RunConfig
    training: Sampling
    processes: int
    calls: tuple[int, int]
    """Calls of the denoiser for one sample, in rollouts and in evaluations."""

    @property
    def samples(self) -> int:
        return self.config.data.prompts_per_step * self.config.data.group_size

    @cached_property
    def windows(self) -> list[Window]:
        """Of every step of the run."""
        return [self.training.window(NoiseKey(self.config.seed, step)) for step in range(self.config.train.steps)]

    @property
    def decisions(self) -> int:
        """Of a sample, in the step that has most."""
        likelihood = self.config.likelihood
        return likelihood.decisions if likelihood.kind == "forward" else max(w.size for w in self.windows)

    @property
    def drawn(self) -> int:
        """Outputs for a draw of a step's samples, on average where windows move: what a branch shares counts once."""
        if self.config.data.rows != "prompts":
            return 0  # they are read
        spared = self.samples - self.samples // self.training.branching.size
        shared = sum(w.start for w in self.windows) / len(self.windows)
        return self.samples * self.calls[0] - round(spared * shared)

    @property
    def guidance(self) -> float:
        """Under which θ itself is evaluated."""
        return self.training.guidance if self.config.likelihood.kind == "reverse" else 1.0

    @property
    def micro_batch(self) -> tuple[int, int]:
        """Samples and decisions of each, in a differentiated pass of a process (difrl/training/microbatches.py)."""
        train = self.config.train
        share = self.samples // self.processes // train.updates_per_step
        objective, group_size = self.config.objective.build(self.config.likelihood), self.config.compared
        part = extent(objective, self.decisions, train.micro_batch, group_size)
        return min(part.rows, share), part.columns

    @property
    def differentiated(self) -> int:
        """Evaluations whose activations are alive at once."""
        return math.prod(self.micro_batch) * _twice(self.guidance)

    def evaluations(self, prompts: int, training: int = 0) -> Evaluations:
        """Of a run that is evaluated on so many prompts, and trained on so many."""
        config, likelihood = self.config, self.config.likelihood
        sizes = [likelihood.decisions] if likelihood.kind == "forward" else [w.size for w in self.windows]
        one = round(self.samples * sum(sizes) / len(sizes))
        named = get_references(config).values()
        own = [*(r for r in named if r.samples == "own"), *reward_anchors(config).values(), *self._statistics]
        again, rehearsed = [r for r in named if r.samples == "rehearsal"], self._rehearsed
        compared = [(one, r) for r in own] + [(rehearsed, r) for r in again]
        return Evaluations(
            rollout=self.drawn * _twice(self.training.guidance),
            gradient=(one + rehearsed) * _twice(self.guidance),
            references=sum(n * _twice(r.guidance or self.guidance) for n, r in compared) + self._inverted,
            evaluation=samples_evaluated(config, prompts) * self.calls[1] * _twice(self.training.guidance),
            draws=config.collect.max_draws,
            steps=config.train.steps,
            compared=samples_compared(config, training, self.processes)
            * self.calls[0]
            * _twice(self.training.guidance),
        )

    @property
    def _statistics(self) -> list[Reference]:
        """Under which weights a pass for the objective's statistics evaluates; none where micro-batches hold whole groups."""
        objective, size = self.config.objective.build(self.config.likelihood), self.config.compared
        share = self.samples // self.processes // self.config.train.updates_per_step
        part = extent(objective, self.decisions, self.config.train.micro_batch, size)
        if self_contained(objective, torch.arange(share) // size, part):
            return []
        named, read = get_references(self.config), get_references_read(objective)
        return [Reference(CURRENT, None, None), *(r for name, r in named.items() if name in read)]

    @property
    def _rehearsed(self) -> int:
        """Decisions of a step's rehearsed samples, which are of a file and so of a forward likelihood."""
        rehearsal = self.config.rehearsal
        return 0 if rehearsal is None else rehearsal.prompts_per_step * rehearsal.group_size * self.decisions

    @property
    def _inverted(self) -> int:
        """Evaluations of the backward sampler runs that a step's noise comes from."""
        return len(get_inversion_snapshots(self.config)) * self.samples * (self.training.grid.steps - 1)


def samples_evaluated(config: RunConfig, prompts: int) -> int:
    """Samples drawn for evaluations, their sheets and the sweep, counted twice where RLG blends two models."""
    settings, steps = config.eval, config.train.steps
    if settings.every == 0 or prompts == 0:
        return 0
    final = settings.final_images or settings.images
    during = (steps - 1) // settings.every
    sheets = (during + 2) * min(settings.show, prompts) * settings.columns
    # The distance to the base is measured at every weight, for which w = 1 needs the base beside the tuned model.
    sweep = sum(1 if weight == 0 else 2 for weight in settings.rlg) * settings.images
    return 2 * final + during * settings.images + sheets + sweep


def samples_compared(config: RunConfig, prompts: int, processes: int) -> int:
    """Reference samples, at most: of each prompt once in every process that meets it."""
    if config.references is None:
        return 0
    met = config.train.steps * config.collect.max_draws * config.data.prompts_per_step
    return config.references.count * min(met, prompts * processes)


def _twice(guidance: float) -> int:
    """Evaluations for an output under classifier-free guidance."""
    return 1 if guidance == 1 else 2


def plan_of(config: RunConfig, family: Family, processes: int) -> Plan:
    """Builds the grid, the kernel, the window and the solver, which say themselves what does not fit."""
    try:
        training, evaluation = build_samplings(config, family)
        return Plan(config, training, processes, (_calls(training, family), _calls(evaluation, family)))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _calls(sampling: Sampling, family: Family) -> int:
    """Counted on a model that says zero, since a solver may call it more than once a step, or not fit it at all."""
    if sampling.scheduler is None:
        return sampling.grid.steps
    model = counting(lambda x_t, t, condition: torch.zeros_like(x_t))
    length, steps = family.sequence_length(sampling.shape), sampling.grid.steps
    x_init, condition = torch.zeros(1, *sampling.shape), Condition({"nothing": torch.zeros(1)})
    try:
        solve(model, family.process, sampling.scheduler, steps, x_init, condition, sequence_length=length)
    except Exception as error:  # each scheduler of diffusers refuses in its own way
        name = type(sampling.scheduler).__name__
        raise ConfigError(f"rollout.solver: {name} cannot drive this model in {steps} steps: {error}") from error
    return model.evaluations
