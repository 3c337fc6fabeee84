"""A recipe's reward by itself, as `difrl score` and `difrl serve` have it: an ensemble is one reward, without training's part."""

from __future__ import annotations

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
    """Raise if two have one name, or one has a key that means something in training alone."""
    labels = [config.label for config in configs]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"two rewards are called '{twice}'; give one another label, e.g. {{name: …, label: {twice}-2}}"
        )
    for config in configs:
        keys = [*(["shape"] if config.shapes else []), *(["weight"] if config.weight != 1 else [])]
        if keys:
            raise ConfigError(
                f"reward '{config.label}' has a {' and a '.join(keys)}, which is for training; here it is scored as it is: "
                f"leave {'it' if len(keys) == 1 else 'them'} out"
            )


def build_standalone(config: RewardConfig, device: torch.device | str) -> Reward:
    """The reward, or the ensemble, that passes `check_standalone`."""
    if config.ensemble is None:
        return build_reward(config).to(device)
    return Ensemble(build_term(config, lambda member: build_reward(member).to(device)))


@dataclass(frozen=True)
class Ensemble:
    """The members of a term, combined, as one reward."""

    term: RewardTerm

    @property
    def name(self) -> str:
        """The term's label."""
        return self.term.label

    @property
    def needs(self) -> tuple[str, ...]:
        """What any of the members does."""
        return tuple(dict.fromkeys(need for member in self.term.members.values() for need in member.reward.needs))

    def to(self, device: torch.device | str) -> Ensemble:
        """Move the members."""
        for member in self.term.members.values():
            member.reward.to(device)
        return self

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """A row that a member cannot score is not valid."""
        device = samples.device if isinstance(samples, Tensor) else torch.device("cpu")
        found = {name: score(member.reward, samples, prompts, metadata) for name, member in self.term.members.items()}
        return self.term.raw_scores(
            {name: Scores(s.values.to(device), s.valid.to(device)) for name, s in found.items()}
        )
