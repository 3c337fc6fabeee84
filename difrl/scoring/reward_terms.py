"""Terms of the weighted sum: the scores of one or several rewards, combined and shaped.

    members → their shapes → combination → shape

A plain reward is the only member of its own term. Shapes that compare samples with reference samples need the scores of
these too. The scores of reference samples pass through the same shapes and the same combination.
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
    """Scores of B samples, with the groups and reference samples that shapes compare them with."""

    scores: Scores
    groups: Tensor
    """[B]."""
    reference_scores: Scores | None = None
    """[B, M], of M reference samples of each sample's prompt, if there are any."""

    def get_reference_scores(self) -> Scores:
        """Return the reference samples' scores [B, M]. Raise ValueError if there are none."""
        if self.reference_scores is None:
            raise ValueError(
                "its shape compares with reference samples, and there are none; set references: {count: 5}"
            )
        return self.reference_scores


Shape = Callable[[ScoresInContext], Scores]
"""A transformation of scores [B] to scores [B]."""
Combine = Callable[[Scores], Scores]
"""A function from the members' scores [K, B] to scores [B]."""


@dataclass(frozen=True)
class EnsembleMember:
    """A reward of a term, with its own shape."""

    reward: Reward
    shape: Shape | None = None


@dataclass(frozen=True)
class RewardTerm:
    """A term of the weighted sum. Members are listed by their names in metrics."""

    label: str
    members: Mapping[str, EnsembleMember]
    combine: Combine = mean  # the mean of one member is the member
    shape: Shape | None = None
    compares: bool = False
    """True if one of the shapes compares with reference samples."""

    @classmethod
    def from_reward(cls, label: str, reward: Reward) -> RewardTerm:
        """Return the term of a single reward without a shape."""
        return cls(label, {label: EnsembleMember(reward)})

    @property
    def has_shape(self) -> bool:
        """Whether the term or one of its members has a shape."""
        return self.shape is not None or any(member.shape is not None for member in self.members.values())

    def raw_scores(self, scores: Mapping[str, Scores]) -> Scores:
        """Return the combined scores [B] without any shape, given the members' scores [B]."""
        return self.combine(stack([scores[name] for name in self.members]))

    def shaped_scores(
        self, scores: Mapping[str, Scores], groups: Tensor, reference_scores: Mapping[str, Scores]
    ) -> dict[str, Scores]:
        """Return the term's scores [B] under its label, and the shaped scores [B] of members with a shape under theirs.

        scores: [B], by member. reference_scores: [B, M], by member, of those that scored reference samples.
        """
        try:
            parts = {
                name: _apply_shape(ScoresInContext(scores[name], groups, reference_scores.get(name)), member.shape)
                for name, member in self.members.items()
            }
            whole = _apply_shape(self._combine_parts(list(parts.values())), self.shape)
        except ValueError as error:
            raise RewardError(self.label, f"cannot be shaped: {error}") from error
        changed = {name: parts[name].scores for name, member in self.members.items() if member.shape is not None}
        return {**changed, self.label: whole.scores}

    def _combine_parts(self, parts: list[ScoresInContext]) -> ScoresInContext:
        scores = self.combine(stack([part.scores for part in parts]))
        known = [part.reference_scores for part in parts if part.reference_scores is not None]
        if len(known) < len(parts):
            return ScoresInContext(scores, parts[0].groups)
        flat = self.combine(stack([Scores(r.values.flatten(), r.valid.flatten()) for r in known]))
        return ScoresInContext(scores, parts[0].groups, _reshape(flat, known[0].values.shape))


def _apply_shape(context: ScoresInContext, shape: Shape | None) -> ScoresInContext:
    """Return the shaped scores. Reference samples are shaped as samples of a group of their own row."""
    if shape is None:
        return context
    scores = shape(context)
    if context.reference_scores is None:
        return replace(context, scores=scores)
    values, valid = context.reference_scores
    count, each = values.shape
    rows = torch.arange(count, device=values.device).repeat_interleave(each)
    own = ScoresInContext(Scores(values.flatten(), valid.flatten()), rows, Scores(values[rows], valid[rows]))
    return replace(context, scores=scores, reference_scores=_reshape(shape(own), values.shape))


def _reshape(scores: Scores, shape: torch.Size) -> Scores:
    return Scores(scores.values.reshape(shape), scores.valid.reshape(shape))


def build_term(config: RewardConfig, build: Callable[[MemberConfig], Reward]) -> RewardTerm:
    """Build the term of a recipe's reward; `build` builds a reward."""
    if config.ensemble is None:
        members = {config.label: EnsembleMember(build(config), build_shape(config.shape))}
        return RewardTerm(config.label, members, compares=config.compares)
    named = {f"{config.label}/{m.label}": EnsembleMember(build(m), build_shape(m.shape)) for m in config.ensemble}
    return RewardTerm(config.label, named, _build_combine(config), build_shape(config.shape), config.compares)


def _build_combine(config: RewardConfig) -> Combine:
    if config.combine == "uncertainty":
        assert config.penalty is not None
        return partial(uncertainty, penalty=config.penalty)
    return worst if config.combine == "worst" else mean


def build_shape(config: ShapeConfig | None) -> Shape | None:
    """Build the function of a recipe's shape; None without a shape."""
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
            return lambda c: par(c.scores, c.get_reference_scores())
        case LogSigmoidShape(quantile=quantile):
            return lambda c: log_sigmoid(c.scores, c.get_reference_scores(), quantile=quantile)
        case NoiseShape(false_positive=positive, false_negative=negative):
            return lambda c: denoised(c.scores, false_positive=positive, false_negative=negative)
