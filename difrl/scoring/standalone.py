"""Rewards of a recipe outside training, for `difrl score` and `difrl serve`. An ensemble is one reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difrl.config import RewardConfig
from difrl.config.yaml_source import ConfigError
from difrl.scoring.reward_terms import RewardTerm, build_term
from difrl.scoring.scorer import build_reward
from rewards import Reward, Scores, score
from rewards.base import Metadata, Samples


def check_standalone(configs: Sequence[RewardConfig]) -> None:
    """Raise ConfigError if two rewards have the same label, or if one has keys that only apply to training."""
    for label, count in Counter(config.label for config in configs).items():
        if count > 1:
            raise ConfigError(
                f"two rewards are called '{label}'; give one another label, e.g. {{name: …, label: {label}-2}}"
            )
    for config in configs:
        keys = [*(["shape"] if config.shapes else []), *(["weight"] if config.weight != 1 else [])]
        if keys:
            raise ConfigError(
                f"reward '{config.label}' has a {' and a '.join(keys)}, which only applies to training: "
                f"leave {'it' if len(keys) == 1 else 'them'} out"
            )


def build_standalone(config: RewardConfig, device: torch.device | str) -> Reward:
    """Build a reward or an ensemble, after `check_standalone`."""
    if config.ensemble is None:
        return build_reward(config).to(device)
    return Ensemble(build_term(config, lambda member: build_reward(member).to(device)))


@dataclass(frozen=True)
class Ensemble:
    """A reward that combines the members of a term."""

    term: RewardTerm

    @property
    def name(self) -> str:
        """Label of the term."""
        return self.term.label

    @property
    def needs(self) -> tuple[str, ...]:
        """Inputs of all members."""
        return tuple(dict.fromkeys(need for member in self.term.members.values() for need in member.reward.needs))

    def to(self, device: torch.device | str) -> Ensemble:
        """Move the members, and return this reward."""
        for member in self.term.members.values():
            member.reward.to(device)
        return self

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score samples. A row that a member cannot score is invalid."""
        device = samples.device if isinstance(samples, Tensor) else "cpu"
        members = self.term.members.items()
        scores = {name: score(member.reward, samples, prompts, metadata).to(device) for name, member in members}
        return self.term.raw_scores(scores)
