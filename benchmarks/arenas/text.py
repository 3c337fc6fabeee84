"""Text arena: settings trained by the real trainer on a language model whose distributions are all known.

A cell is a recipe and the fixed point at which it should end (difrl/tasks/exact/enumerable_solutions.py). The trained table is
read from the weights, so the results are exact up to the noise of training itself.
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
from difrl.policies.language.policy import LanguagePolicy
from difrl.policies.load import load_policy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.tasks.exact.enumerable import LENGTH, EnumerableTask
from difrl.tasks.exact.enumerable_solutions import Array, completion_probabilities, exponential_tilt, kl
from difrl.training.trainer import Trainer

GROUP = 256
"""Samples of a prompt in a step: enough that a group's standard deviation is close to that of the distribution."""
BETA = 1.0
"""β of the π* with which every cell is compared."""

Answer = Callable[[Array, Array], Array]
"""(π_ref, r) of a prompt, [4, 4, 4] each → π at the fixed point."""


@dataclass(frozen=True)
class Cell:
    """A setting with its fixed point."""

    name: str
    estimator: str
    place: str
    optimises: str
    """The quantity that it optimises, in a few words or a formula."""
    sections: Mapping[str, Any]
    answer: Answer | None
    """None without a fixed point."""
    steps: int = 150


@dataclass(frozen=True)
class Measured:
    """Divergences in nats, means over prompts."""

    to_answer: float
    """KL(trained ‖ fixed point); NaN without one."""
    to_optimum: float
    """KL(trained ‖ π*)."""
    answer_to_optimum: float
    """KL(fixed point ‖ π*): the bias of the setting."""
    likeliest: float
    """Trained probability of the completion with the highest reward."""
    evaluations: int
    """Number of generated tokens."""


def build_config(folder: Path, cell: Cell, *, prompts: int, seed: int = 0, steps: int | None = None) -> RunConfig:
    """Build the recipe of a cell."""
    sections = cell.sections
    return RunConfig.model_validate(
        {
            "output_dir": folder / "run",
            "seed": seed,
            "model": {"path": str(folder / "model"), "train": "full"},
            "data": {"train": str(folder / "prompts.jsonl"), "prompts_per_step": prompts, "group_size": GROUP},
            "rewards": [{"import": "difrl.tasks.exact.enumerable:TableReward"}],
            "likelihood": {"kind": "tokens"},
            "objective": {"kind": "clipped"},
            "advantage": {"baseline": "leave_one_out", "std": "none"},
            "generation": {"max_new_tokens": LENGTH, "chat": False},
            "eval": {"every": 0, "rlg": [], "diversity": []},
            **sections,
            "rollout": {"batch": 4096, **sections.get("rollout", {})},
            # The rate falls to 0, so that the end does not contain the noise of the last steps.
            "train": {
                "steps": steps or cell.steps,
                "lr": {"kind": "linear", "start": 0.1, "end": 0.0},
                "micro_batch": 10**6,
                "max_grad_norm": 1e9,
                "threads": 1,
                **sections.get("train", {}),
            },
        }
    )


def train(config: RunConfig) -> Trainer:
    """Train every step of a recipe with the real trainer, and return it; the policy is trainer.policy."""
    scorer = Scorer.build(config.rewards, config.watch, torch.device("cpu"))
    trainer = Trainer(config, load_policy(config), scorer, load_prompts(config.data.train), DistributedContext())
    for step in range(config.train.steps):
        trainer.step(step)
    return trainer


def tables(policy: LanguagePolicy) -> Array:
    """Return the trained table, [prompts, NODES, 4]."""
    return np.asarray(policy.network.model.tables().double().numpy())


def measure(trainer: Trainer, cell: Cell, task: EnumerableTask) -> Measured:
    """Measure the distances of a trained policy from the cell's fixed point and from π*."""
    policy: LanguagePolicy = trainer.policy  # type: ignore[assignment]
    found = []
    for trained, base, reward in zip(tables(policy), task.logits, task.rewards, strict=True):
        end, reference = completion_probabilities(trained), completion_probabilities(base)
        optimum = exponential_tilt(reference, reward, BETA)
        gaps = (float("nan"),) * 2
        if cell.answer is not None:
            rest = cell.answer(reference, reward)
            gaps = (kl(end, rest), kl(rest, optimum))
        found.append((gaps[0], kl(end, optimum), gaps[1], float(end.flat[reward.argmax()])))
    return Measured(*np.mean(found, axis=0).tolist(), trainer.evaluations)
