"""From a rollout to its rewards: every reward of the recipe is called once, checked, shaped, and summed by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import rewards
from difrl.config import MemberConfig, RewardConfig
from difrl.config.yaml_source import ConfigError
from difrl.data.modality import Modality
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.runtime.paths import PACKAGE
from difrl.scoring.reward_terms import RewardTerm, build_term
from rewards import Failsafe, Reward, Scores
from rewards.combination import stack, weighted_sum

# What a shipped reward needs besides what the recipe says: the judge's weights come with difrl, not with rewards/.
SHIPPED_OPTIONS: Mapping[str, Mapping[str, str]] = {"judge": {"path": str(PACKAGE / "assets" / "judge")}}


def build_reward(config: MemberConfig) -> Reward:
    """The reward a recipe names, with its rule for failures."""
    name = config.import_ or config.name or ""
    try:
        reward = rewards.make(name, **{**SHIPPED_OPTIONS.get(name, {}), **config.options})
    except ValueError as error:  # a name, an import path or an option that does not exist
        raise ConfigError(str(error)) from error
    return Failsafe(reward, config.on_error, config.timeout, config.retries)


def modality_mismatch(reward: Reward, medium: Modality) -> str | None:
    """Why a reward cannot score samples of a medium; None where it can, or where it does not say which it reads."""
    own = f"{medium.key}s"
    others = [need for need in reward.needs if need in ("images", "texts")]
    if not others or own in others:
        return None
    return f"it reads {' and '.join(others)}, and here it would be given {own}; `difrl rewards` lists those of {own}"


@dataclass(frozen=True)
class Scorer:
    """The rewards that are optimised, each with the weight that evaluations take, and those that are only watched."""

    optimised: Mapping[str, tuple[RewardTerm, float]]
    watched: Mapping[str, RewardTerm]

    @classmethod
    def build(cls, optimised: Sequence[RewardConfig], watched: Sequence[RewardConfig], device: torch.device) -> Scorer:
        def term(config: RewardConfig) -> RewardTerm:
            return build_term(config, lambda member: build_reward(member).to(device))

        return cls({r.label: (term(r), r.settled) for r in optimised}, {r.label: term(r) for r in watched})

    @classmethod
    def from_rewards(cls, optimised: Mapping[str, tuple[Reward, float]], watched: Mapping[str, Reward]) -> Scorer:
        """Of rewards as they are."""
        terms = {name: (RewardTerm.from_reward(name, reward), weight) for name, (reward, weight) in optimised.items()}
        return cls(terms, {name: RewardTerm.from_reward(name, reward) for name, reward in watched.items()})

    def check_modality(self, medium: Modality) -> None:
        """Raise if a reward is of another medium than the samples."""
        terms = [*(term for term, _ in self.optimised.values()), *self.watched.values()]
        members = {name: member.reward for term in terms for name, member in term.members.items()}
        found = {name: modality_mismatch(reward, medium) for name, reward in members.items()}
        if problems := [f"reward '{name}': {problem}" for name, problem in found.items() if problem is not None]:
            raise ConfigError(*problems)

    @property
    def weights(self) -> dict[str, float]:
        """Those of evaluations."""
        return {name: weight for name, (_, weight) in self.optimised.items()}

    @property
    def reference_rewards(self) -> dict[str, Reward]:
        """Member -> the reward, of those that score reference samples too."""
        terms = [term for term, _ in self.optimised.values() if term.compares]
        return {name: member.reward for term in terms for name, member in term.members.items()}

    def __call__(self, rollout: Rollout) -> ScoredRollout:
        """Scores every sample, without any shape, and sums by the weights of evaluations."""
        found, parts = self._found(rollout)
        return self._sum(
            rollout, {name: term.raw_scores(found) for name, (term, _) in self.optimised.items()}, self.weights, parts
        )

    def score_for_training(
        self, rollout: Rollout, weights: Mapping[str, float], references: Mapping[str, Scores] | None = None
    ) -> ScoredRollout:
        """Scores every sample and sums what the shapes make of it, by the weights of a step: what is optimised.

        weights: by name, where they are not those of evaluations. references: member -> [B, M], for those of `compared`.
        """
        found, parts = self._found(rollout)
        for name, known in (references or {}).items():
            parts[f"references/invalid/{name}"] = (~known.valid.any(dim=1)).float()
        summed: dict[str, Scores] = {}
        for name, (term, _) in self.optimised.items():
            made = term.shaped_scores(found, rollout.groups, references or {})
            summed[name] = made[name]
            if term.shaped:
                parts |= {f"shaped/{key}": _shown(scores) for key, scores in made.items()}
        return self._sum(rollout, summed, {**self.weights, **weights}, parts)

    def _found(self, rollout: Rollout) -> tuple[dict[str, Scores], dict[str, Tensor]]:
        """Member -> what it says of every sample, and the metrics of that; of ensembles too."""
        found: dict[str, Scores] = {}
        parts: dict[str, Tensor] = {}
        optimised = {name: term for name, (term, _) in self.optimised.items()}
        for prefix, terms in (("reward", optimised), ("watch", self.watched)):
            for name, term in terms.items():
                own = {key: score(member.reward, rollout) for key, member in term.members.items()}
                found |= own
                parts |= {
                    f"{prefix}/{key}": _shown(scores) for key, scores in {name: term.raw_scores(own), **own}.items()
                }
                parts |= {f"invalid/{key}": (~scores.valid).float() for key, scores in own.items()}
        return found, parts

    def _sum(
        self, rollout: Rollout, summed: Mapping[str, Scores], weights: Mapping[str, float], parts: Mapping[str, Tensor]
    ) -> ScoredRollout:
        """A row that one of the optimised rewards cannot score is not valid as a whole.

        A reward of weight 0 is only reported, so that what it cannot score is valid all the same.
        """
        total = weighted_sum(stack(list(summed.values())), [weights[name] for name in summed])
        return ScoredRollout(rollout, total.values, total.valid, parts)


def score(reward: Reward, rollout: Rollout) -> Scores:
    """What a reward says of every sample, [B], where the rollout is."""
    scores = rewards.score(reward, rollout.content, rollout.prompt_texts, rollout.metadata)
    device = rollout.groups.device
    return Scores(scores.values.to(device), scores.valid.to(device))


def _shown(scores: Scores) -> Tensor:
    """As a metric: NaN in rows that could not be scored."""
    return torch.where(scores.valid, scores.values, torch.nan)
