"""Estimators of the advantages of a step: from the weighted sum of rewards, or from each reward separately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from difrl.core.advantages import Baseline, Std, advantages, gdpo_advantages, scale_by_sign


class AdvantageEstimator(Protocol):
    """A function from the rewards of a step to advantages."""

    @property
    def reads(self) -> Sequence[str]:
        """Names of the columns that it needs besides the total."""

    def __call__(
        self, total: Tensor, columns: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor, valid: Tensor
    ) -> Tensor:
        """Return advantages [B] of the samples of all processes.

        Args:
          total: weighted sum of rewards, [B].
          columns: name -> [B].
          weights: reward -> number.
          groups: [B] ids.
          valid: [B] bool.
        """


@dataclass(frozen=True)
class TotalRewardAdvantage:
    """The advantage of the weighted sum of rewards: `advantages`, then `scale_by_sign`."""

    baseline: Baseline = "mean"
    std: Std = "group"
    clip: float | None = None
    scale: float = 1.0
    positive: float = 1.0
    negative: float = 1.0
    reads: Sequence[str] = ()

    def __call__(
        self, total: Tensor, columns: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor, valid: Tensor
    ) -> Tensor:
        a = advantages(total, groups, valid, baseline=self.baseline, std=self.std, clip=self.clip, scale=self.scale)
        return scale_by_sign(a, self.positive, self.negative)


@dataclass(frozen=True)
class PerRewardAdvantage:
    """The advantages of each reward, summed by weight (GDPO, 2601.05242): `gdpo_advantages`, then `scale_by_sign`."""

    columns: Mapping[str, str]
    """Column that the weight of each reward multiplies, by reward."""
    baseline: Baseline = "mean"
    clip: float | None = None
    scale: float = 1.0
    positive: float = 1.0
    negative: float = 1.0

    @property
    def reads(self) -> Sequence[str]:
        return tuple(self.columns.values())

    def __call__(
        self, total: Tensor, columns: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor, valid: Tensor
    ) -> Tensor:
        rewards = {name: columns[column] for name, column in self.columns.items()}
        used = {name: weights[name] for name in rewards}
        a = gdpo_advantages(rewards, used, groups, valid, baseline=self.baseline, clip=self.clip, scale=self.scale)
        return scale_by_sign(a, self.positive, self.negative)
