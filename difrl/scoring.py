"""From a rollout to its rewards: every reward of the recipe is called once, checked, and summed by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import rewards
from difrl.config import RewardConfig
from difrl.located import ConfigError
from difrl.paths import PACKAGE
from difrl.rollout import Rollout, Scored
from rewards import Failsafe, Reward

# What a shipped reward needs besides what the recipe says: the judge's weights come with difrl, not with rewards/.
SHIPPED_OPTIONS: Mapping[str, Mapping[str, str]] = {"judge": {"path": str(PACKAGE / "assets" / "judge")}}


def build_reward(config: RewardConfig) -> Reward:
    """The reward a recipe names, with its rule for failures."""
    name = config.import_ or config.name or ""
    try:
        reward = rewards.make(name, **{**SHIPPED_OPTIONS.get(name, {}), **config.options})
    except ValueError as error:  # a name, an import path or an option that does not exist
        raise ConfigError(str(error)) from error
    return Failsafe(reward, config.on_error, config.timeout, config.retries)


@dataclass(frozen=True)
class Scorer:
    """The rewards that are optimised, with their weights, and those that are only watched."""

    optimised: Mapping[str, tuple[Reward, float]]
    watched: Mapping[str, Reward]

    @classmethod
    def build(cls, optimised: Sequence[RewardConfig], watched: Sequence[RewardConfig], device: torch.device) -> Scorer:
        return cls(
            {r.label: (build_reward(r).to(device), r.weight) for r in optimised},
            {r.label: build_reward(r).to(device) for r in watched},
        )

    def __call__(self, rollout: Rollout) -> Scored:
        """Scores every sample. A row that one of the optimised rewards cannot score is not valid as a whole.

        A reward of weight 0 is only reported, so that what it cannot score is valid all the same.
        """
        total = torch.zeros(len(rollout), device=rollout.groups.device)
        valid = torch.ones(len(rollout), dtype=torch.bool, device=rollout.groups.device)
        parts: dict[str, Tensor] = {}
        for name, (reward, weight) in self.optimised.items():
            scores = _score(reward, rollout)
            parts[f"reward/{name}"] = torch.where(scores.valid, scores.values, torch.nan)
            parts[f"invalid/{name}"] = (~scores.valid).float()
            total = total + weight * scores.values
            valid = valid & (scores.valid | (weight == 0))
        for name, reward in self.watched.items():
            scores = _score(reward, rollout)
            parts[f"watch/{name}"] = torch.where(scores.valid, scores.values, torch.nan)
            parts[f"invalid/{name}"] = (~scores.valid).float()
        return Scored(rollout, torch.where(valid, total, 0.0), valid, parts)


def _score(reward: Reward, rollout: Rollout) -> rewards.Scores:
    scores = rewards.score(reward, rollout.content, rollout.texts_of_prompts, rollout.metadata)
    device = rollout.groups.device
    return rewards.Scores(scores.values.to(device), scores.valid.to(device))
