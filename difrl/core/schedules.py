"""Numbers that change over a run: coefficients of anchors, weights of rewards, decays of snapshots, the learning rate.

n counts from 0, in the unit of the caller: steps, or optimizer updates. All are frozen. A coefficient that reacts to
the run returns its successor, and `state` is the part of it that a checkpoint must hold.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difrl.core.numerics import to_unit_interval


@dataclass(frozen=True)
class Coefficient(ABC):
    """A number for each step. Subclasses define `value`; by default the number is the same for all samples and fixed."""

    @abstractmethod
    def value(self, step: int) -> float:
        """Return the number at a step."""

    def per_sample(self, step: int, advantages: Tensor) -> Tensor:
        """Return one number a sample, [B], for advantages [B]; value(step) unless it depends on them."""
        return torch.full_like(advantages, self.value(step))

    def updated(self, measured: float) -> Coefficient:
        """Return the coefficient of the next step, for the mean divergence or reward measured at this one."""
        return self

    def state(self) -> dict[str, float]:
        """Return the numbers that `updated` changes, for a checkpoint; {} if it changes none."""
        return {}

    def with_state(self, state: Mapping[str, float]) -> Coefficient:
        """Return this coefficient with the state of a checkpoint."""
        return self


@dataclass(frozen=True)
class Schedule(Coefficient):
    """A warm-up from 0, `hold` at start, then from start to end over `steps` along `shape`, then end.

    n < warmup:   start (n + 1) / warmup
    after it:     start + (end - start) shape(u),    u = min(1, max(0, n - warmup - hold) / steps)
    """

    start: float
    end: float
    steps: float
    warmup: int = 0
    hold: int = 0

    def __post_init__(self) -> None:
        if not self.steps > 0 or self.warmup < 0 or self.hold < 0:
            raise ValueError(
                f"steps is {self.steps}, warmup {self.warmup} and hold {self.hold}, expected steps > 0 and the others >= 0"
            )

    @abstractmethod
    def shape(self, u: float) -> float:
        """Return the progress from start (0) to end (1) at u in [0, 1], with shape(0) = 0 and shape(1) = 1."""

    def value(self, step: int) -> float:
        if step < self.warmup:
            return self.start * (step + 1) / self.warmup
        u = min(1.0, max(0, step - self.warmup - self.hold) / self.steps)
        return self.start + (self.end - self.start) * self.shape(u)


@dataclass(frozen=True)
class Linear(Schedule):
    """shape(u) = u. min(a + b max(0, n - h), c) is Linear(a, c, (c - a) / b, hold=h)."""

    def shape(self, u: float) -> float:
        return u


@dataclass(frozen=True)
class Cosine(Schedule):
    """shape(u) = (1 - cos(pi u)) / 2."""

    def shape(self, u: float) -> float:
        return (1.0 - math.cos(math.pi * u)) / 2.0


@dataclass(frozen=True)
class Constant(Coefficient):
    """One level throughout, after a warm-up at level (n + 1) / warmup."""

    level: float
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}, expected >= 0")

    def value(self, step: int) -> float:
        return self.level * min(1.0, (step + 1) / self.warmup) if self.warmup else self.level


@dataclass(frozen=True)
class Controller(Coefficient):
    """A level that reacts to the run. Subclasses define `updated`; the level is the state."""

    level: float

    def value(self, step: int) -> float:
        return self.level

    def state(self) -> dict[str, float]:
        return {"level": self.level}

    def with_state(self, state: Mapping[str, float]) -> Coefficient:
        return replace(self, level=state["level"])


@dataclass(frozen=True)
class TargetKL(Controller):
    """Proportional control in log space of a divergence towards a target (1909.08593, section 2.2).

        e = clip((D - target) / target, -bound, bound),    level <- level (1 + gain e)

    D is the mean divergence of a step, in the units of its kind. Published: gain = 0.1, bound = 0.2, so that a
    step changes the level by at most 2 %.
    """

    target: float
    gain: float = 0.1
    bound: float = 0.2

    def __post_init__(self) -> None:
        if not (self.level > 0 and self.target > 0 and self.gain > 0 and 0 < self.bound < 1 / self.gain):
            raise ValueError(
                f"level is {self.level}, target {self.target}, gain {self.gain} and bound {self.bound}; expected all above "
                "0, and gain times bound below 1, so that the level stays above 0"
            )

    def updated(self, measured: float) -> TargetKL:
        if not math.isfinite(measured):
            raise ValueError(f"the divergence is {measured}, expected a finite number; a controller cannot react to it")
        error = min(self.bound, max(-self.bound, (measured - self.target) / self.target))
        return replace(self, level=self.level * (1.0 + self.gain * error))


@dataclass(frozen=True)
class LagrangeMultiplier(Controller):
    """A Lagrange multiplier as the weight of a reward: it keeps the reward's mean on one side of a threshold (2310.04373).

        at least:   maximise E r_0 subject to E r >= threshold,   weight +level,   level <- level + rate (threshold - m)
        at most:    maximise E r_0 subject to E r <= threshold,   weight -level,   level <- level + rate (m - threshold)

    with m the mean of r in a step, and the level kept in [0, highest]: gradient descent on the dual problem. The weight
    tends to 0 where the constraint holds without it. The authors' code mixes the rewards by sigmoid(level) and has momentum
    0.9; here the bound is `highest`, and there is no momentum.
    """

    threshold: float
    at_least: bool = True
    rate: float = 0.1
    highest: float = 10.0

    def __post_init__(self) -> None:
        if not (self.rate > 0 and 0 <= self.level <= self.highest):
            raise ValueError(
                f"level is {self.level}, rate {self.rate} and highest {self.highest}; expected a rate above 0 and a level "
                "from 0 to highest"
            )

    @property
    def _sign(self) -> float:
        return 1.0 if self.at_least else -1.0

    def value(self, step: int) -> float:
        return self._sign * self.level

    def updated(self, measured: float) -> LagrangeMultiplier:
        if not math.isfinite(measured):
            raise ValueError(
                f"the mean reward is {measured}, expected a finite number; a multiplier cannot react to it"
            )
        moved = self.level + self.rate * self._sign * (self.threshold - measured)
        return replace(self, level=min(self.highest, max(0.0, moved)))


@dataclass(frozen=True)
class RewardAdaptive(Coefficient):
    """One number a sample, larger for better samples: they are held to the anchor more strongly (CRD, 2603.14128).

        c_i = base (kappa + (1 - kappa) r_i) = floor + (base - floor) r_i,    kappa = floor / base
        r_i = clip(A_i, -a, a) / (2 a) + 1/2 in [0, 1], as in the objective of CRD,    a = limit

    Published: base = 0.1, floor = 1e-4, a = 5. A sample with advantage 0 gets about half of base.
    """

    base: Coefficient
    floor: float = 1e-4
    limit: float = 5.0

    def __post_init__(self) -> None:
        if not (self.floor >= 0 and self.limit > 0):
            raise ValueError(f"floor is {self.floor} and limit {self.limit}, expected floor >= 0 and limit > 0")

    def value(self, step: int) -> float:
        """Return the number of the best samples, r = 1."""
        return self.base.value(step)

    def per_sample(self, step: int, advantages: Tensor) -> Tensor:
        return self.floor + (self.value(step) - self.floor) * to_unit_interval(advantages, self.limit)
