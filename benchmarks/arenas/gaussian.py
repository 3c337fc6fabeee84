"""Gaussian arena: cells of the grid trained by the real trainer on a task with known answers.

A cell is a recipe and the closed form at which it should end. `train` runs it; `measure` reads the trained weights as affine
maps, so the results are exact up to the noise of training itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from difrl.config import RunConfig
from difrl.data.prompts import load_prompts
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.tasks.exact.gaussian import GaussianTask
from difrl.tasks.exact.gaussian_solutions import (
    Array,
    Chain,
    ExactDenoiser,
    Normal,
    build_exact_denoiser,
    constant_mean,
    probe_chain,
)
from difrl.training.cost.estimate import estimate
from difrl.training.trainer import Trainer
from samplers import Condition, Grid, Window, ode, solve

TASK = GaussianTask()
DIMENSIONS = len(TASK.covariance)
STEPS = 12
"""Number of denoising steps of a rollout."""
FINE = 200
"""Number of steps of the ODE that measures a network independently of its sampler."""
GROUP = 64
BETA = 1.0
"""β of the π* with which every cell is compared."""


@dataclass(frozen=True)
class Setting:
    """Arguments of an answer: a prompt of the task, and the sampler of the cell."""

    policy: DiffusionPolicy
    data: Normal
    direction: Array

    @property
    def rows(self) -> Array:
        """Times of the network's table."""
        return np.array(self.policy.family.denoiser.config.times)

    @property
    def base(self) -> ExactDenoiser:
        """Exact denoiser of the data."""
        return build_exact_denoiser(self.policy.process, self.data.cov, constant_mean(self.data.mean))

    def chain(self, output: ExactDenoiser) -> Chain:
        """Return the chain of the cell's rollouts with a denoiser."""
        return build_chain(self.policy, output)

    def end(self, output: ExactDenoiser) -> Normal:
        """Return the distribution at the end of the cell's rollouts with a denoiser."""
        return self.chain(output).end()


Answer = Callable[[Setting], Normal]
"""Function that returns the distribution of the cell's sampler at the fixed point of training."""


@dataclass(frozen=True)
class Cell:
    """A point of the grid."""

    name: str
    likelihood: str
    objective: str
    anchor: str
    sections: Mapping[str, Any]
    answer: Answer | None
    """None without a fixed point."""
    why: str
    """Sentence on its fixed point."""


@dataclass(frozen=True)
class Measured:
    """Divergences of the samples of the trained network in nats, means over prompts."""

    to_answer: float
    """KL(end of the training sampler ‖ fixed point); NaN without one."""
    to_optimum: float
    """KL(end of the training sampler ‖ π*)."""
    answer_to_optimum: float
    """KL(fixed point ‖ π*): the bias of the method on this task."""
    ode_to_optimum: float
    """KL(end of the same network's ODE in many steps ‖ π*)."""
    nearest_beta: float
    """β of the tilt of the data whose mean is nearest to that of the fixed point."""
    residue: float
    """KL between Gaussians with the covariance of the data at these two means, which no choice of β removes."""
    evaluations: int


def build_config(folder: Path, sections: Mapping[str, Any], *, seed: int = 0, budget: int = 400_000) -> RunConfig:
    """Build the recipe of a cell, with the number of steps that spends a budget of denoiser evaluations."""
    recipe: dict[str, Any] = {
        "output_dir": folder / "run",
        "seed": seed,
        "model": {"path": str(folder / "model"), "train": "full"},
        "data": {
            "train": str(folder / "prompts.jsonl"),
            "prompts_per_step": len(TASK.prompts),
            "group_size": GROUP,
        },
        "rewards": [{"import": "difrl.tasks.exact.gaussian:LinearReward"}],
        "advantage": {"baseline": "leave_one_out", "std": "none"},
        **sections,
        "rollout": {"steps": STEPS, "batch": 4096, **sections.get("rollout", {})},
        # The rate falls to 0, so that the end does not contain the noise of the last steps.
        "train": {
            "lr": {"kind": "linear", "start": 0.1, "end": 0.0},
            "micro_batch": 10**6,
            "max_grad_norm": 1e9,
            "threads": 1,
            **sections.get("train", {}),
        },
    }
    config = RunConfig.model_validate(recipe)
    cost = estimate(config).evaluations.step
    recipe["train"]["steps"] = max(1, budget // cost)
    return RunConfig.model_validate(recipe)


def train(config: RunConfig) -> Trainer:
    """Train every step of a recipe with the real trainer, and return it; the policy is trainer.policy."""
    scorer = Scorer.build(config.rewards, config.watch, torch.device("cpu"))
    trainer = Trainer(
        config, load_diffusion_policy(config), scorer, load_prompts(config.data.train), DistributedContext()
    )
    for step in range(config.train.steps):
        trainer.step(step)
    return trainer


def build_output(policy: DiffusionPolicy, prompt: int, snapshot: str = "current") -> ExactDenoiser:
    """Return the network for one prompt as a function of flat states."""
    denoiser = policy.denoiser(snapshot, policy.sampling.guidance)

    @torch.no_grad()
    def output(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        one_hot = torch.zeros(len(x_t), len(TASK.prompts))
        one_hot[:, prompt] = 1.0
        return denoiser(x_t.float()[:, :, None, None], t, Condition({"prompt": one_hot})).flatten(1)

    return output


def build_chain(policy: DiffusionPolicy, output: ExactDenoiser) -> Chain:
    """Return the chain of the training sampler with a denoiser. A solver of diffusers is a single step, from start to end."""
    sampling = policy.sampling
    if sampling.scheduler is None:
        window = sampling.window(NoiseKey(0, 0))
        return probe_chain(output, policy.process, sampling.grid, sampling.kernel, window, DIMENSIONS)
    probes = torch.cat([torch.zeros(1, DIMENSIONS), torch.eye(DIMENSIONS)]).double()
    nothing = Condition({"nothing": torch.zeros(len(probes), 0)})

    def denoiser(x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        return output(x_t, t)

    ends = solve(denoiser, policy.process, sampling.scheduler, sampling.grid.steps, probes, nothing, sequence_length=1)
    matrix, offset = (ends[1:] - ends[0]).T.double().numpy(), ends[0].double().numpy()
    return Chain(matrix[None], offset[None], np.zeros(1))


def build_settings(policy: DiffusionPolicy) -> list[Setting]:
    """Return the arguments of the answers, for each prompt."""
    cov = np.array(TASK.covariance)
    return [
        Setting(policy, Normal(np.array(mean), cov), np.array(direction))
        for mean, direction in zip(TASK.means, TASK.directions, strict=True)
    ]


def measure(trainer: Trainer, answer: Answer | None) -> Measured:
    """Measure the distances of a trained policy from the cell's fixed point and from π* = N(mean + Σa/β, Σ)."""
    policy: DiffusionPolicy = trainer.policy  # type: ignore[assignment]
    fine, none = Grid(torch.linspace(1, 0, FINE + 1)), float("nan")
    found: list[tuple[float, ...]] = []
    for prompt, setting in enumerate(build_settings(policy)):
        output = build_output(policy, prompt)
        end, optimum = setting.end(output), setting.data.tilted(setting.direction, BETA)
        slow = probe_chain(output, policy.process, fine, ode, Window(0, 0), DIMENSIONS).end()
        tends = None if answer is None else answer(setting)
        gaps = (none, none) if tends is None else (end.kl(tends), tends.kl(optimum))
        nearest = (none, none) if tends is None else nearest_tilt(setting, tends.mean)
        found.append((gaps[0], end.kl(optimum), gaps[1], slow.kl(optimum), *nearest))
    return Measured(*np.mean(found, axis=0).tolist(), trainer.evaluations)


def nearest_tilt(setting: Setting, mean: Array) -> tuple[float, float]:
    """Return (β, KL) of the tilt N(m + Σa/β, Σ) that has the least KL from N(mean, Σ)."""
    data, direction, shift = setting.data, setting.direction, mean - setting.data.mean
    strength = direction @ shift / (direction @ data.cov @ direction)
    return 1 / strength, Normal(mean, data.cov).kl(data.tilted(direction, 1 / strength))
