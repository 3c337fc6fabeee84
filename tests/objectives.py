"""Objectives that difrl does not ship (yet), written to show that the contract suffices for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from difrl.core import (
    Clipped,
    Likelihoods,
    Objective,
    RowObjective,
    Scope,
    checked,
    group_mean,
    group_sum,
    resolved,
    weighted,
)

Tensors = dict[str, Tensor]
Given = Mapping[str, Tensor]


def unit(a: Tensor, bound: float) -> Tensor:
    """Advantages as rewards in [0, 1]."""
    return a.clamp(-bound, bound) / (2 * bound) + 0.5


@dataclass(frozen=True)
class Distilled(RowObjective):
    """Centred reward distillation (2603.14128): (a / beta) (beta (delta - mean delta) - (r - mean r))^2."""

    bound: float = 5.0
    beta: float = 1.0
    temperature: float | None = None
    raw: bool = False

    @property
    def scope(self) -> Scope:
        return "group"

    def summarise(self, lik: Likelihoods) -> Tensors:
        return {"delta": lik.log_ratio("old").detach()}

    def rewards(self, a: Tensor) -> Tensor:
        return a if self.raw else unit(a, self.bound)

    def statistics(self, rows: Given, mask: Tensor, advantages: Tensor, groups: Tensor) -> Tensors:
        r = self.rewards(advantages)
        weights = mask if self.temperature is None else mask * (r / self.temperature).exp()
        return {"delta": group_mean(groups, rows["delta"], weights), "reward": group_mean(groups, r, weights)}

    def __call__(
        self, lik: Likelihoods, advantages: Tensor, groups: Tensor, statistics: Given | None = None
    ) -> tuple[Tensor, Tensors]:
        a = checked(self, lik, advantages, groups)
        centre = resolved(self, lik, advantages, groups, statistics)
        delta = lik.log_ratio("old") - centre["delta"]
        error = self.beta * delta - (self.rewards(a) - centre["reward"])
        scale = (1.0 if self.raw else self.bound) / self.beta
        return scale * error.square(), {"delta": delta.detach()}


@dataclass(frozen=True)
class NegativeAware(RowObjective):
    """DiffusionNFT (2509.16117): (a / b) (-r l+ - (1 - r) l-)."""

    bound: float = 5.0
    mix: float = 0.7

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"mixed/plus", "mixed/minus"})

    def __call__(
        self, lik: Likelihoods, advantages: Tensor, groups: Tensor, statistics: Given | None = None
    ) -> tuple[Tensor, Tensors]:
        r = unit(checked(self, lik, advantages, groups), self.bound)
        return self.bound / self.mix * (-r * lik["mixed/plus"] - (1 - r) * lik["mixed/minus"]), {}


@dataclass(frozen=True)
class Preference(RowObjective):
    """DPO (2305.18290): -log sigmoid(beta (delta_w - delta_l)); groups are pairs, the higher advantage is w.

    Each row sees its partner as a constant; with twice its gradient, the mean over rows is that over pairs.
    """

    beta: float = 0.5

    @property
    def scope(self) -> Scope:
        return "group"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"references/base"})

    def summarise(self, lik: Likelihoods) -> Tensors:
        return {"delta": lik.log_ratio("base").detach()}

    def statistics(self, rows: Given, mask: Tensor, advantages: Tensor, groups: Tensor) -> Tensors:
        whole = group_mean(groups, mask.double(), None) == 1  # a pair with a masked half teaches nothing
        partner = group_sum(groups, rows["delta"]) - rows["delta"]
        return {"partner": partner, "sign": torch.where(whole, advantages.sign(), 0.0)}

    def __call__(
        self, lik: Likelihoods, advantages: Tensor, groups: Tensor, statistics: Given | None = None
    ) -> tuple[Tensor, Tensors]:
        checked(self, lik, advantages, groups)
        pair = resolved(self, lik, advantages, groups, statistics)
        margin = self.beta * pair["sign"] * (lik.log_ratio("base") - pair["partner"])
        loss = F.softplus(-margin)
        return 2 * loss - loss.detach(), {"margin": margin.detach()}


@dataclass(frozen=True)
class RatioNormalised(RowObjective):
    """GRPO-Guard (2510.22319): Clipped on scale (log rho + bias), bias closed-form or estimated."""

    clip: float = 0.2
    estimated: bool = False

    @property
    def scope(self) -> Scope:
        return "batch" if self.estimated else "row"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"references/old", "scale"} | (set() if self.estimated else {"bias"}))

    def summarise(self, lik: Likelihoods) -> Tensors:
        return {"log_ratio": lik.log_ratio("old").detach()} if self.estimated else {}

    def statistics(self, rows: Given, mask: Tensor, advantages: Tensor, groups: Tensor) -> Tensors:
        if not self.estimated:
            return {}
        mean = -(rows["log_ratio"] * mask).sum(0) / mask.sum(0).clamp(min=1)
        return {"bias": mean.expand_as(rows["log_ratio"])}

    def __call__(
        self, lik: Likelihoods, advantages: Tensor, groups: Tensor, statistics: Given | None = None
    ) -> tuple[Tensor, Tensors]:
        a = checked(self, lik, advantages, groups)
        bias = resolved(self, lik, advantages, groups, statistics)["bias"] if self.estimated else lik["bias"]
        log_ratio = lik["scale"] * (lik.log_ratio("old") + bias)
        ratio = log_ratio.exp()
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - self.clip, 1 + self.clip))
        return weighted(loss, lik), {"log_ratio": log_ratio.detach()}


@dataclass(frozen=True)
class DivergenceMasked(RowObjective):
    """Flow-DPPO (2606.11025): -A rho, dropped where KL(old || theta) >= delta and leading away."""

    delta: float = 0.02

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"references/old", "divergence/old"})

    def __call__(
        self, lik: Likelihoods, advantages: Tensor, groups: Tensor, statistics: Given | None = None
    ) -> tuple[Tensor, Tensors]:
        a = checked(self, lik, advantages, groups)
        ratio = lik.log_ratio("old").exp()
        away = ((a > 0) & (ratio > 1)) | ((a < 0) & (ratio < 1))
        dropped = away & (lik.divergence["old"] >= self.delta)
        return torch.where(dropped, 0.0, -a * ratio), {"dropped": dropped.double()}


OBJECTIVES: list[Objective] = [
    Clipped(0.1, 0.3),
    Clipped(None, None, decisions="mean"),
    Distilled(),
    Distilled(raw=True, decisions="sum"),
    Distilled(temperature=0.5, decisions="mean"),
    NegativeAware(),
    NegativeAware(decisions="mean"),
    Preference(decisions="sum"),
    Preference(decisions="mean"),
    RatioNormalised(),
    RatioNormalised(estimated=True),
    DivergenceMasked(),
]
