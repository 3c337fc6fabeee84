"""Numbers that change over a run: of anchors, of a snapshot's decay, of the learning rate.

n counts from 0. All are frozen: a coefficient that reacts to the run returns its successor, so its fields are
its whole state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coefficient:
    """What a caller may ask of a coefficient. `value` is to be defined; the rest has a default."""

    def value(self, step: int) -> float:
        """The number at a step."""
        raise NotImplementedError(f"{type(self).__name__} must define value(step)")

    def rows(self, step: int, advantages: Tensor) -> Tensor:
        """One number a sample, [B], given the samples' advantages [B]: value(step), unless it adapts."""
        return torch.full_like(advantages, self.value(step))

    def observed(self, divergence: float) -> Coefficient:
        """The coefficient of the next step, given the mean divergence of this one: itself, or adapted."""
        return self


@dataclass(frozen=True)
class Schedule(Coefficient):
    """From start to end over `steps` steps along `shape`, then end; before that a warm-up from 0 to start.

    n < warmup:   start (n + 1) / warmup
    after it:     start + (end - start) shape(u),    u = min(1, (n - warmup) / steps)
    """

    start: float
    end: float
    steps: float
    warmup: int = 0

    def __post_init__(self) -> None:
        if not self.steps > 0 or self.warmup < 0:
            raise ValueError(f"steps is {self.steps} and warmup {self.warmup}, expected steps > 0 and warmup >= 0")

    def shape(self, u: float) -> float:
        """[0, 1] -> [0, 1], from 0 to 1."""
        raise NotImplementedError(f"{type(self).__name__} must define shape(u)")

    def value(self, step: int) -> float:
        if step < self.warmup:
            return self.start * (step + 1) / self.warmup
        return self.start + (self.end - self.start) * self.shape(min(1.0, (step - self.warmup) / self.steps))


@dataclass(frozen=True)
class Linear(Schedule):
    """shape(u) = u. min(a + b n, c) is Linear(a, c, (c - a) / b)."""

    def shape(self, u: float) -> float:
        return u


@dataclass(frozen=True)
class Cosine(Schedule):
    """shape(u) = (1 - cos(pi u)) / 2."""

    def shape(self, u: float) -> float:
        return (1.0 - math.cos(math.pi * u)) / 2.0


@dataclass(frozen=True)
class Constant(Coefficient):
    """One level throughout, after a warm-up of level (n + 1) / warmup."""

    level: float
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}, expected >= 0")

    def value(self, step: int) -> float:
        return self.level * min(1.0, (step + 1) / self.warmup) if self.warmup else self.level
