"""Denoisers `(x_t, t[B], condition) -> raw output`, and wrappers around them that compose.

A raw output is affine in the score for every prediction type, so blends of outputs are blends of scores and
no wrapper needs to know the process. A base denoiser looks only at `condition.tensors`; guidance pairs them
with `negative`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.grid import Grid
from samplers.process import expand, raised


@dataclass(frozen=True, eq=False)
class Condition:
    """What a model is conditioned on: named tensors [B,...], and those of the negative (or empty) prompt."""

    tensors: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.negative is not None and set(self.negative) != set(self.tensors):
            raise ValueError(
                f"the negative condition has {sorted(self.negative)}, the positive {sorted(self.tensors)}; "
                "both need the same names"
            )
        every = [*self.tensors.items(), *(self.negative or {}).items()]
        sizes = {value.shape[0] for _, value in every}
        if len(sizes) != 1:
            shapes = {name: tuple(value.shape) for name, value in every}
            raise ValueError(f"a condition needs at least one tensor and one batch size in all; got {shapes}")

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """The condition with every tensor changed alike."""

        def changed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: change(value) for name, value in tensors.items()}

        return Condition(changed(self.tensors), None if self.negative is None else changed(self.negative))

    def select(self, index: Tensor | slice | list[int]) -> Condition:
        """The rows of an integer or boolean index."""
        return self.map(lambda value: value[index])

    def repeat_interleave(self, n: int) -> Condition:
        """Each row n times in a row, as a group of samples needs."""
        return self.map(lambda value: value.repeat_interleave(n, dim=0))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """Moves every tensor; `dtype` is for floating-point ones only (token ids and masks keep theirs)."""
        return self.map(lambda value: value.to(device, dtype if value.is_floating_point() else None))

    @classmethod
    def cat(cls, conditions: Sequence[Condition]) -> Condition:
        """Rows of all, in order. Either all have a negative or none has."""
        if not conditions:
            raise ValueError("no conditions to concatenate")
        negatives = [condition.negative for condition in conditions if condition.negative is not None]
        if negatives and len(negatives) != len(conditions):
            raise ValueError(
                f"{len(negatives)} of {len(conditions)} conditions have a negative; give one to all "
                "(the empty prompt's will do) or to none"
            )
        tensors = _cat([condition.tensors for condition in conditions])
        return cls(tensors, _cat(negatives) if negatives else None)


def _cat(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


# `t` is float64 in a run: what calls the model casts `x_t`, and the timestep that it makes of `t`, for it.
Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]


def classifier_free(denoiser: Denoiser, scale: float) -> Denoiser:
    """negative + scale (conditional - negative), one call on the doubled batch: 2207.12598, scale = 1 + w.

    A scale of 1 is the conditional output: the denoiser itself, at its own cost.
    """
    if scale == 1:
        return denoiser

    def guided(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if condition.negative is None:
            raise ValueError(
                f"classifier-free guidance at scale {scale} needs the condition's `negative`, the tensors of "
                "the negative or empty prompt; give it, or use scale 1"
            )
        both = Condition(_cat([condition.negative, condition.tensors]))
        negative, conditional = raised(denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)).chunk(2)
        return negative + scale * (conditional - negative)

    return guided


def reinforcement_learning(
    base: Denoiser, tuned: Denoiser, weight: float, *, first_steps: int = 0, grid: Grid | None = None
) -> Denoiser:
    """RLG, 2508.21016: base + w (tuned - base), each already under its own classifier-free guidance.

    w = 0 is the base, 1 the tuned model (each a single evaluation), beyond 1 extrapolates. The `first_steps`
    of `grid` use w = 1 (also a single evaluation). It acts like training with the KL coefficient divided by
    w: exactly so where base and optimum are Gaussians of one covariance, approximately elsewhere.
    """
    if first_steps < 0:
        raise ValueError(f"first_steps must be 0 or more, got {first_steps}")
    if weight == 1:
        return tuned
    if first_steps == 0:
        return base if weight == 0 else _blend(base, tuned, weight)
    if grid is None:
        raise ValueError(f"first_steps={first_steps} is counted on a grid; pass the run's `grid`")
    if first_steps >= grid.steps:
        return tuned
    # Half-way between two evaluation times, so that no rounding of t moves a step across.
    start = float(grid.times[first_steps - 1 : first_steps + 1].mean())
    late = reinforcement_learning(base, tuned, weight)

    def switched(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        early = t > start
        if early.all():
            return tuned(x_t, t, condition)
        if not early.any():
            return late(x_t, t, condition)
        tuned_output, late_output = raised(tuned(x_t, t, condition)), raised(late(x_t, t, condition))
        return torch.where(expand(early, x_t).bool(), tuned_output, late_output)

    return switched


def _blend(base: Denoiser, tuned: Denoiser, weight: float) -> Denoiser:
    def blended(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        reference = raised(base(x_t, t, condition))
        return reference + weight * (raised(tuned(x_t, t, condition)) - reference)

    return blended


class Counting:
    """A denoiser that counts the evaluations it is asked for, one a sample.

    Put it inside the guidance wrappers: the doubled batch of `classifier_free` then counts two a sample.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.evaluations = 0

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.evaluations += x_t.shape[0]
        return self.denoiser(x_t, t, condition)


def counting(denoiser: Denoiser) -> Counting:
    """`denoiser` with a count of its per-sample evaluations in `.evaluations`."""
    return Counting(denoiser)
