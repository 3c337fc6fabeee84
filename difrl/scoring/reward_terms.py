"""A term of the weighted sum: what one or several rewards say of a sample, combined and shaped.

    members → their shapes → combined → shape

A plain reward is the only member of its own term. Shapes that compare need the same of reference samples, which pass
through the members' shapes as the samples of the step do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from difrl.config import (
    ClipShape,
    LogSigmoidShape,
    MemberConfig,
    MinMaxShape,
    NoiseShape,
    ParShape,
    RewardConfig,
    ShapeConfig,
)
from rewards import Reward, RewardError, Scores
from rewards.combination import mean, stack, uncertainty, worst
from rewards.shaping import clip, denoised, log_sigmoid, min_max, min_max_of_groups, par


@dataclass(frozen=True)
class ScoresInContext:
    """Scores of B samples, and what they can be compared with."""

    scores: Scores
    groups: Tensor
    """[B]."""
    references: Scores | None = None
    """[B, M], of reference samples of each sample's prompt; None where there are none."""

    def peers(self) -> Scores:
        """The reference samples' scores, [B, M], for a shape that compares."""
        if self.references is None:
            raise ValueError(
                "its shape compares with reference samples, and there are none; set references: {count: 5}"
            )
        return self.references


Shape = Callable[[ScoresInContext], Scores]
"""[B] -> [B]."""
Combine = Callable[[Scores], Scores]
"""[K, B] -> [B]."""


@dataclass(frozen=True)
class EnsembleMember:
    """A reward of a term."""

    reward: Reward
    shape: Shape | None = None


@dataclass(frozen=True)
class RewardTerm:
    """Members by the name that each has in metrics."""

    label: str
    members: Mapping[str, EnsembleMember]
    combine: Combine = mean  # which is the member itself where there is one
    shape: Shape | None = None
    compares: bool = False
    """Whether some shape compares with reference samples."""

    @classmethod
    def from_reward(cls, label: str, reward: Reward) -> RewardTerm:
        """A reward as it is."""
        return cls(label, {label: EnsembleMember(reward)})

    @property
    def shaped(self) -> bool:
        return self.shape is not None or any(member.shape is not None for member in self.members.values())

    def raw_scores(self, found: Mapping[str, Scores]) -> Scores:
        """What the term comes to without any shape. found: member -> [B]."""
        return self.combine(stack([found[name] for name in self.members]))

    def shaped_scores(
        self, found: Mapping[str, Scores], groups: Tensor, references: Mapping[str, Scores]
    ) -> dict[str, Scores]:
        """What is multiplied by the weight, by the term's label, and what shapes make of members, by theirs; each [B].

        found: member -> [B]; references: member -> [B, M], of those that were scored.
        """
        try:
            parts = {
                name: _shaped(ScoresInContext(found[name], groups, references.get(name)), member.shape)
                for name, member in self.members.items()
            }
            whole = _shaped(self._combined(list(parts.values())), self.shape)
        except ValueError as error:
            raise RewardError(self.label, f"cannot be shaped: {error}") from error
        changed = {name: parts[name].scores for name, member in self.members.items() if member.shape is not None}
        return {**changed, self.label: whole.scores}

    def _combined(self, parts: list[ScoresInContext]) -> ScoresInContext:
        scores = self.combine(stack([part.scores for part in parts]))
        known = [part.references for part in parts if part.references is not None]
        if len(known) < len(parts):
            return ScoresInContext(scores, parts[0].groups)
        flat = self.combine(stack([Scores(r.values.flatten(), r.valid.flatten()) for r in known]))
        return ScoresInContext(scores, parts[0].groups, _unflattened(flat, known[0].values.shape))


def _shaped(compared: ScoresInContext, shape: Shape | None) -> ScoresInContext:
    """With the shape made of the scores, and of each reference sample among those of its row."""
    if shape is None:
        return compared
    scores = shape(compared)
    if compared.references is None:
        return replace(compared, scores=scores)
    values, valid = compared.references
    count, each = values.shape
    rows = torch.arange(count, device=values.device).repeat_interleave(each)
    own = ScoresInContext(Scores(values.flatten(), valid.flatten()), rows, Scores(values[rows], valid[rows]))
    return replace(compared, scores=scores, references=_unflattened(shape(own), values.shape))


def _unflattened(scores: Scores, shape: torch.Size) -> Scores:
    return Scores(scores.values.reshape(shape), scores.valid.reshape(shape))


def build_term(config: RewardConfig, build: Callable[[MemberConfig], Reward]) -> RewardTerm:
    """The term of a recipe's reward; `build` makes a reward."""
    if config.ensemble is None:
        members = {config.label: EnsembleMember(build(config), build_shape(config.shape))}
        return RewardTerm(config.label, members, compares=config.compares)
    named = {f"{config.label}/{m.label}": EnsembleMember(build(m), build_shape(m.shape)) for m in config.ensemble}
    return RewardTerm(config.label, named, _combine_of(config), build_shape(config.shape), config.compares)


def _combine_of(config: RewardConfig) -> Combine:
    if config.combine == "uncertainty":
        assert config.penalty is not None
        return partial(uncertainty, penalty=config.penalty)
    return worst if config.combine == "worst" else mean


def build_shape(config: ShapeConfig | None) -> Shape | None:
    """What a recipe's shape makes of scores."""
    match config:
        case None:
            return None
        case ClipShape(low=low, high=high):
            return lambda c: clip(c.scores, low=low, high=high)
        case MinMaxShape(low=float(low), high=float(high)):
            return lambda c: min_max(c.scores, low=low, high=high)
        case MinMaxShape():
            return lambda c: min_max_of_groups(c.scores, c.groups)
        case ParShape():
            return lambda c: par(c.scores, c.peers())
        case LogSigmoidShape(quantile=quantile):
            return lambda c: log_sigmoid(c.scores, c.peers(), quantile=quantile)
        case NoiseShape(false_positive=positive, false_negative=negative):
            return lambda c: denoised(c.scores, false_positive=positive, false_negative=negative)
