"""Scoring of a rollout: every reward of the recipe is called once, checked, shaped, and summed by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

import rewards
from difrl.config import MemberConfig, RewardConfig, SampledFrames
from difrl.config.yaml_source import ConfigError
from difrl.data.modality import Modality
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.runtime.errors import UserError
from difrl.runtime.paths import PACKAGE
from difrl.runtime.progress import phase
from difrl.scoring.reward_terms import RewardTerm, build_term
from rewards import Failsafe, PerFrame, Reward, RewardError, Scores
from rewards.base import describe_exception, preload
from rewards.combination import concatenate, stack, weighted_sum

Key = TypeVar("Key")

SHIPPED_OPTIONS: Mapping[str, Mapping[str, str]] = {"judge": {"path": str(PACKAGE / "assets" / "judge")}}
"""Default options of rewards. The judge's weights are part of difrl, not of rewards/."""


def build_reward(config: MemberConfig) -> Reward:
    """Build a reward of a recipe, with its rules for the frames of videos and for failures."""
    name = config.import_ or config.name or ""
    try:
        reward = rewards.make(name, **{**SHIPPED_OPTIONS.get(name, {}), **config.options})
    except ValueError as error:  # a name, an import path or an option that does not exist
        raise ConfigError(str(error)) from error
    return Failsafe(_score_by_frames(reward, config.frames), config.on_error, config.timeout, config.retries)


def _score_by_frames(reward: Reward, frames: Literal["mean", "worst"] | SampledFrames | None) -> Reward:
    """Return the reward that scores videos by their frames, unless it scores whole videos or no pictures."""
    if frames is None:
        return PerFrame(reward) if "images" in reward.needs and "videos" not in reward.needs else reward
    readable = [need for need in reward.needs if need in ("images", "videos", "texts")]
    if readable and "images" not in readable:
        raise ConfigError(f"frames: it reads {' and '.join(readable)}, and not single frames; remove frames")
    if isinstance(frames, SampledFrames):
        return PerFrame(reward, frames.sample)
    return PerFrame(reward, worst=frames == "worst")


def modality_mismatch(reward: Reward, modality: Modality) -> str | None:
    """Return the reason why a reward cannot score samples of a modality.

    None if it can, or if its `needs` contain neither images, videos nor texts.
    """
    samples = f"{modality.key}s"
    readable = [need for need in reward.needs if need in ("images", "videos", "texts")]
    if not readable or samples in readable:
        return None
    reads = " and ".join(readable)
    return f"it reads {reads}, and the samples here are {samples}; `difrl rewards` lists the rewards of {samples}"


@dataclass(frozen=True)
class Scorer:
    """The rewards of a recipe: those that are optimised, with their weights in evaluations, and those that are watched."""

    optimised: Mapping[str, tuple[RewardTerm, float]]
    watched: Mapping[str, RewardTerm]

    @classmethod
    def build(
        cls,
        optimised: Sequence[RewardConfig],
        watched: Sequence[RewardConfig],
        device: torch.device | str,
        modality: Modality | None = None,
    ) -> Scorer:
        """Build the rewards of a recipe on a device. Raise ConfigError with the problems of all of them.

        modality: modality of the samples; a reward that cannot score it is a problem.
        """
        built, problems = dict[int, Reward](), list[str]()
        for section, rewards_of in (("rewards", optimised), ("watch", watched)):
            for index, member in [(i, member) for i, config in enumerate(rewards_of) for member in config.members]:
                try:
                    with phase(f"loading reward {member.label}"):
                        reward = built[id(member)] = build_reward(member).to(device)
                    problem = modality and modality_mismatch(reward, modality)
                except Exception as error:  # a reward is anybody's code
                    problem = str(error) if isinstance(error, UserError | RewardError) else describe_exception(error)
                if problem:
                    problems.append(f"{section}.{index} ({member.label}): {problem}")
        if problems:
            raise ConfigError(*problems)

        def term(config: RewardConfig) -> RewardTerm:
            return build_term(config, lambda member: built[id(member)])

        return cls({r.label: (term(r), r.settled) for r in optimised}, {r.label: term(r) for r in watched})

    def preload(self) -> None:
        """Load the models of all rewards, which they would else load at their first call. Raise RewardError."""
        with phase("loading rewards"):
            for term in (*(term for term, _ in self.optimised.values()), *self.watched.values()):
                for member in term.members.values():
                    preload(member.reward)

    @classmethod
    def from_rewards(cls, optimised: Mapping[str, tuple[Reward, float]], watched: Mapping[str, Reward]) -> Scorer:
        """Return the scorer of rewards without shapes, by name, each optimised one with its weight."""
        terms = {name: (RewardTerm.from_reward(name, reward), weight) for name, (reward, weight) in optimised.items()}
        return cls(terms, {name: RewardTerm.from_reward(name, reward) for name, reward in watched.items()})

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the optimised rewards in evaluations, by name."""
        return {name: weight for name, (_, weight) in self.optimised.items()}

    @property
    def reference_rewards(self) -> dict[str, Reward]:
        """Rewards that score reference samples too, by the name of their member."""
        terms = [term for term, _ in self.optimised.values() if term.compares]
        return {name: member.reward for term in terms for name, member in term.members.items()}

    def __call__(self, rollout: Rollout) -> ScoredRollout:
        """Score every sample, and sum the scores by the weights of evaluations, without any shape."""
        scores, parts = self._score_members(rollout)
        raw = {name: term.raw_scores(scores) for name, (term, _) in self.optimised.items()}
        return self._sum(rollout, raw, self.weights, parts)

    def score_for_training(
        self, rollout: Rollout, weights: Mapping[str, float], reference_scores: Mapping[str, Scores] | None = None
    ) -> ScoredRollout:
        """Score every sample, and sum the shaped scores by the weights of a step. The sum is what the step optimises.

        weights: by name, if they differ from those of evaluations. reference_scores: [B, M], scores of reference samples by
        member, for those in `reference_rewards`.
        """
        scores, parts = self._score_members(rollout)
        for name, known in (reference_scores or {}).items():
            parts[f"references/invalid/{name}"] = (~known.valid.any(dim=1)).float()
        shaped: dict[str, Scores] = {}
        for name, (term, _) in self.optimised.items():
            shaped_parts = term.shaped_scores(scores, rollout.groups, reference_scores or {})
            shaped[name] = shaped_parts[name]
            if term.has_shape:
                parts |= {f"shaped/{key}": values_or_nan(part) for key, part in shaped_parts.items()}
        return self._sum(rollout, shaped, {**self.weights, **weights}, parts)

    def _score_members(self, rollout: Rollout) -> tuple[dict[str, Scores], dict[str, Tensor]]:
        """Return the scores [B] of every member of every term, by name, and the metrics [B] of members and ensembles."""
        terms = [("reward", name, term) for name, (term, _) in self.optimised.items()]
        terms += [("watch", name, term) for name, term in self.watched.items()]
        members = {(prefix, key): each.reward for prefix, _, term in terms for key, each in term.members.items()}
        found = score_rollout(members, rollout)
        scores: dict[str, Scores] = {}
        parts: dict[str, Tensor] = {}
        for prefix, name, term in terms:
            own = {key: found[prefix, key] for key in term.members}
            scores |= own
            reported = {name: term.raw_scores(own), **own}
            parts |= {f"{prefix}/{key}": values_or_nan(part) for key, part in reported.items()}
            parts |= {f"invalid/{key}": (~part.valid).float() for key, part in own.items()}
        return scores, parts

    def _sum(
        self, rollout: Rollout, scores: Mapping[str, Scores], weights: Mapping[str, float], parts: Mapping[str, Tensor]
    ) -> ScoredRollout:
        """Sum scores by weight. A row is invalid if any optimised reward cannot score it.

        A reward of weight 0 is only reported, so rows that it cannot score are valid.
        """
        total = weighted_sum(stack(list(scores.values())), [weights[name] for name in scores])
        return ScoredRollout(rollout, total.values, total.valid, parts)


def score_rollout(rewards_by_key: Mapping[Key, Reward], rollout: Rollout) -> dict[Key, Scores]:
    """Return the scores [B] of every sample by every reward, on the rollout's device. Videos are decoded once, by batches."""
    parts: dict[Key, list[Scores]] = {key: [] for key in rewards_by_key}
    for rows, samples in rollout.batches():
        prompts, metadata = rollout.prompt_texts[rows], rollout.metadata[rows]
        for key, reward in rewards_by_key.items():
            with phase(f"reward {reward.name}"):
                parts[key].append(rewards.score(reward, samples, prompts, metadata))
    return {key: concatenate(found).to(rollout.groups.device) for key, found in parts.items()}


def values_or_nan(scores: Scores) -> Tensor:
    """Return the values, with NaN in rows that could not be scored."""
    return torch.where(scores.valid, scores.values, torch.nan)
