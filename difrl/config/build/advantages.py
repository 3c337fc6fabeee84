"""From the rewards of a step to its advantages, as a recipe asks: the total, or every reward by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from difrl.config import AdvantageConfig, RewardConfig
from difrl.core import advantages, decoupled, reweighted


class Estimate(Protocol):
    """Advantages [B] of all processes' samples."""

    @property
    def reads(self) -> Sequence[str]:
        """The columns it wants besides the total: names of `Scored.parts`."""

    def __call__(
        self, total: Tensor, columns: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor, valid: Tensor
    ) -> Tensor:
        """total [B], columns: name -> [B], weights: reward -> number, groups [B], valid [B] bool -> [B]."""


@dataclass(frozen=True)
class OfTotal:
    """Of the weighted sum of rewards."""

    config: AdvantageConfig
    reads: Sequence[str] = ()

    def __call__(
        self, total: Tensor, columns: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor, valid: Tensor
    ) -> Tensor:
        c = self.config
        found = advantages(total, groups, valid, baseline=c.baseline, std=c.std, clip=c.clip, scale=c.scale)
        return reweighted(found, c.positive, c.negative)


@dataclass(frozen=True)
class OfEach:
    """Of every reward by itself, then summed by weight (GDPO, arXiv:2601.05242)."""

    config: AdvantageConfig
    columns: Mapping[str, str]
    """Reward -> the column of what is weighted of it."""

    @property
    def reads(self) -> Sequence[str]:
        return tuple(self.columns.values())

    def __call__(
        self, total: Tensor, columns: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor, valid: Tensor
    ) -> Tensor:
        c = self.config
        own = {name: columns[column] for name, column in self.columns.items()}
        shares = {name: weights[name] for name in own}
        found = decoupled(own, shares, groups, valid, baseline=c.baseline, clip=c.clip, scale=c.scale)
        return reweighted(found, c.positive, c.negative)


def estimate_of(config: AdvantageConfig, rewards: Sequence[RewardConfig]) -> Estimate:
    """The estimate a recipe names."""
    if config.normalise == "each":
        return OfEach(config, {r.label: r.column for r in rewards})
    return OfTotal(config)
