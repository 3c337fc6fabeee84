"""From the rewards of a step to its advantages: from their weighted sum, or from each reward by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from difrl.core.advantages import Baseline, Std, advantages, decoupled, reweighted


class AdvantageEstimator(Protocol):
    """Advantages [B] of the samples of all processes."""

    @property
    def reads(self) -> Sequence[str]:
        """The columns that it needs besides the total."""

    def __call__(
        self, total: Tensor, columns: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor, valid: Tensor
    ) -> Tensor:
        """total [B], columns: name -> [B], weights: reward -> number, groups [B], valid [B] bool -> [B]."""


@dataclass(frozen=True)
class TotalRewardAdvantage:
    """The advantage of the weighted sum of rewards: `advantages`, then `reweighted`."""

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
        found = advantages(total, groups, valid, baseline=self.baseline, std=self.std, clip=self.clip, scale=self.scale)
        return reweighted(found, self.positive, self.negative)


@dataclass(frozen=True)
class PerRewardAdvantage:
    """The advantages of every reward by itself, summed by weight (GDPO, 2601.05242): `decoupled`, then `reweighted`."""

    columns: Mapping[str, str]
    """Reward -> the column that its weight multiplies."""
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
        own = {name: columns[column] for name, column in self.columns.items()}
        shares = {name: weights[name] for name in own}
        found = decoupled(own, shares, groups, valid, baseline=self.baseline, clip=self.clip, scale=self.scale)
        return reweighted(found, self.positive, self.negative)
