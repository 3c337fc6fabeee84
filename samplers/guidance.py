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
    rows: Tensor | None = None
    """[B] int64: which sample of the run each row belongs to, by which wrappers keep what they know of a sample when
    they are given only some of them. None: row i is sample i."""

    def __post_init__(self) -> None:
        if self.negative is not None and set(self.negative) != set(self.tensors):
            raise ValueError(
                f"the negative condition has {sorted(self.negative)}, the positive {sorted(self.tensors)}; "
                "both need the same names"
            )
        every = [*self.tensors.items(), *(self.negative or {}).items()]
        if self.rows is not None:
            every.append(("rows", self.rows))
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

        return Condition(
            changed(self.tensors),
            None if self.negative is None else changed(self.negative),
            None if self.rows is None else change(self.rows),
        )

    def numbered(self, start: int = 0) -> Condition:
        """With `rows` spelt out, from `start` on: what is selected from it still knows its sample."""
        if self.rows is not None:
            return self
        device = next(iter(self.tensors.values())).device
        return Condition(self.tensors, self.negative, torch.arange(start, start + len(self), device=device))

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
        both = with_negatives(condition, slice(None))
        negative, conditional = raised(denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)).chunk(2)
        return negative + scale * (conditional - negative)

    return guided


def with_negatives(condition: Condition, index: Tensor | slice) -> Condition:
    """The negative tensors of some rows, and then the positive ones of all: what one doubled batch is conditioned on."""
    some = condition.select(index)
    assert some.negative is not None
    rows = None if some.rows is None or condition.rows is None else torch.cat([some.rows, condition.rows])
    return Condition(_cat([some.negative, condition.tensors]), rows=rows)


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
    late = base if weight == 0 else _blend(base, tuned, weight)
    return switched(tuned, late, first_steps, grid)


def switched(early: Denoiser, late: Denoiser, first_steps: int, grid: Grid | None) -> Denoiser:
    """`early` in the first steps of a grid, `late` after them."""
    if first_steps == 0:
        return late
    if grid is None:
        raise ValueError(f"first_steps={first_steps} is counted on a grid; pass the run's `grid`")
    if first_steps >= grid.steps:
        return early
    # Half-way between two evaluation times, so that no rounding of t moves a step across.
    start = float(grid.times[first_steps - 1 : first_steps + 1].mean())

    def chosen(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        is_early = t > start
        if is_early.all():
            return early(x_t, t, condition)
        if not is_early.any():
            return late(x_t, t, condition)
        first, second = raised(early(x_t, t, condition)), raised(late(x_t, t, condition))
        return torch.where(expand(is_early, x_t).bool(), first, second)

    return chosen


def _blend(base: Denoiser, tuned: Denoiser, weight: float) -> Denoiser:
    def blended(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        reference = raised(base(x_t, t, condition))
        return reference + weight * (raised(tuned(x_t, t, condition)) - reference)

    return blended


class PerSample:
    """A sum for each sample of a run, to which rows are added; it grows as samples are seen."""

    def __init__(self) -> None:
        self._sums = torch.zeros(0, dtype=torch.float64)

    def add(self, rows: Tensor, amounts: Tensor | float) -> None:
        """Adds to samples `rows` [B] (which may repeat) what each of them gets."""
        missing = int(rows.max()) + 1 - len(self._sums) if len(rows) else 0
        if missing > 0:
            self._sums = torch.cat([self._sums.to(rows.device), self._sums.new_zeros(missing, device=rows.device)])
        values = torch.as_tensor(amounts, dtype=torch.float64, device=rows.device).expand(len(rows))
        self._sums.index_add_(0, rows, values)

    def of(self, count: int) -> Tensor:
        """[count] float64: the sums of samples 0 .. count-1; 0 where nothing was added."""
        known = self._sums[:count]
        return torch.cat([known, known.new_zeros(count - len(known))])


class Counting:
    """A denoiser that counts the evaluations it is asked for, one a sample: in all, and for each sample.

    Put it inside the guidance wrappers: the doubled batch of `classifier_free` then counts two a sample.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.evaluations = 0
        self.per_sample = PerSample()
        """Needs conditions that say whose their rows are, `condition.numbered()`; else row i counts as sample i."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.evaluations += x_t.shape[0]
        self.per_sample.add(rows_of(condition), 1.0)
        return self.denoiser(x_t, t, condition)


def rows_of(condition: Condition) -> Tensor:
    """[B] int64: which sample each row belongs to."""
    rows = condition.numbered().rows
    assert rows is not None
    return rows


def counting(denoiser: Denoiser) -> Counting:
    """`denoiser` with counts of its per-sample evaluations, in all in `.evaluations`."""
    return Counting(denoiser)
