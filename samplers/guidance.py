"""Denoisers `(x_t, t[B], condition) -> raw output`, and wrappers around them that compose.

A raw output is affine in the score for every prediction type, so a blend of outputs is a blend of scores, and
no wrapper depends on the process. A base denoiser reads only `condition.tensors`; guidance pairs them with
`negative`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from samplers.grid import Grid
from samplers.process import at_least_float32, expand


@dataclass(frozen=True, eq=False)
class Condition:
    """Inputs of a model beside state and time: named tensors [B,...], and those of the negative (or empty) prompt."""

    tensors: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None = None
    rows: Tensor | None = None
    """Number of the sample that each row belongs to, [B] int64. Wrappers keep state for each sample by it, also when
    a call has only some of the samples. None: row i is sample i."""

    def __post_init__(self) -> None:
        if self.negative is not None and set(self.negative) != set(self.tensors):
            raise ValueError(
                f"the negative condition has {sorted(self.negative)}, the positive {sorted(self.tensors)}; "
                "both need the same names"
            )
        every = [*self.tensors.items(), *(self.negative or {}).items()]
        if self.rows is not None:
            every.append(("rows", self.rows))
        if len({len(value) for _, value in every}) != 1:
            shapes = {name: tuple(value.shape) for name, value in every}
            raise ValueError(f"a condition needs at least one tensor and one batch size in all; got {shapes}")

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    @cached_property
    def doubled(self) -> Condition:
        """The condition of a doubled batch. It is one object for all steps, so models can keep what they compute from it."""
        return with_negatives(self, slice(None))

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """Return the condition with every tensor changed alike."""
        return Condition(
            {name: change(value) for name, value in self.tensors.items()},
            None if self.negative is None else {name: change(value) for name, value in self.negative.items()},
            None if self.rows is None else change(self.rows),
        )

    def numbered(self, start: int = 0) -> Condition:
        """Return the condition with explicit `rows`, from `start` on, so that selections keep their samples' numbers."""
        if self.rows is not None:
            return self
        device = next(iter(self.tensors.values())).device
        return Condition(self.tensors, self.negative, torch.arange(start, start + len(self), device=device))

    def select(self, index: Tensor | slice | list[int]) -> Condition:
        """Return the rows of an integer or boolean index."""
        return self.map(lambda value: value[index])

    def repeat_interleave(self, n: int) -> Condition:
        """Repeat each row n times, next to each other, for groups of n samples."""
        return self.map(lambda value: value.repeat_interleave(n, dim=0))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """Move every tensor. Only floating-point ones take `dtype`; token ids and masks keep theirs."""
        return self.map(lambda value: value.to(device, dtype if value.is_floating_point() else None))

    @classmethod
    def cat(cls, conditions: Sequence[Condition]) -> Condition:
        """Concatenate the rows of all conditions. Either all of them have a negative or none has."""
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


Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t [B,...], t [B], condition) -> raw output [B,...]. `x_t` is float32 at least and `t` float64 in a run: the denoiser
casts `x_t` and the timestep for its model itself."""


Blend = Callable[[Tensor, Tensor, float], Tensor]
"""(negative, conditional, scale) -> guided output, all [B,...]."""


def extrapolate(negative: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Return negative + scale (conditional - negative)."""
    return negative + scale * (conditional - negative)


def extrapolate_keeping_norm(negative: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Return the same, with each vector along the last dimension scaled to its norm in the conditional output (Qwen-Image)."""
    guided = extrapolate(negative, conditional, scale)
    norm = guided.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(guided.dtype).tiny)  # 0 stays 0
    scaled: Tensor = guided * (conditional.norm(dim=-1, keepdim=True) / norm)
    return scaled


def classifier_free(denoiser: Denoiser, scale: float, blend: Blend = extrapolate) -> Denoiser:
    """Return negative + scale (conditional - negative) as a denoiser (2207.12598, scale = 1 + w).

    Both come from one call on the doubled batch. A scale of 1 is the denoiser itself, with one evaluation a sample.
    """
    if scale == 1:
        return denoiser

    def guided(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), condition.doubled)
        negative, conditional = at_least_float32(both).chunk(2)
        return blend(negative, conditional, scale)

    return guided


def with_negatives(condition: Condition, index: Tensor | slice) -> Condition:
    """Return the condition of a doubled batch: the negative tensors of the rows of `index`, then the positive ones of all."""
    some = condition.select(index)
    if some.negative is None:
        raise ValueError(
            "classifier-free guidance needs the condition's `negative`, the tensors of the negative or empty prompt; "
            "give it, or use scale 1"
        )
    rows = None if some.rows is None or condition.rows is None else torch.cat([some.rows, condition.rows])
    return Condition(_cat([some.negative, condition.tensors]), rows=rows)


def reinforcement_learning(
    base: Denoiser, tuned: Denoiser, weight: float, *, first_steps: int = 0, grid: Grid | None = None
) -> Denoiser:
    """Return base + w (tuned - base) as a denoiser: RLG (2508.21016).

    Both models are already under their own classifier-free guidance. w = 0 is the base and w = 1 the tuned model, with
    one evaluation each; w > 1 extrapolates. The `first_steps` of `grid` use w = 1. The effect is that of training with
    the KL coefficient divided by w: exactly where base and optimum are Gaussians of one covariance, approximately
    elsewhere.
    """
    if first_steps < 0:
        raise ValueError(f"first_steps must be 0 or more, got {first_steps}")
    if weight == 1:
        return tuned

    def blended(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        reference = at_least_float32(base(x_t, t, condition))
        return reference + weight * (at_least_float32(tuned(x_t, t, condition)) - reference)

    return switch_after_steps(tuned, base if weight == 0 else blended, first_steps, grid)


def switch_after_steps(early: Denoiser, late: Denoiser, first_steps: int, grid: Grid | None) -> Denoiser:
    """Return a denoiser that is `early` in the first steps of a grid, and `late` after them."""
    if first_steps == 0:
        return late
    if grid is None:
        raise ValueError(f"first_steps={first_steps} is counted on a grid; pass the run's `grid`")
    if first_steps >= grid.steps:
        return early
    # Half-way between two evaluation times, so that no rounding of t moves a step across.
    start = float(grid.times[first_steps - 1 : first_steps + 1].mean())

    def by_time(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        is_early = t > start
        if is_early.all():
            return early(x_t, t, condition)
        if not is_early.any():
            return late(x_t, t, condition)
        first, second = at_least_float32(early(x_t, t, condition)), at_least_float32(late(x_t, t, condition))
        return torch.where(expand(is_early, x_t).bool(), first, second)

    return by_time


def grow(values: Tensor, rows: Tensor, fill: float) -> Tensor:
    """Return `values`, one for each sample, on the device of `rows` and with `fill` appended up to the largest of `rows`."""
    missing = max(0, int(rows.max()) + 1 - len(values)) if len(rows) else 0
    values = values.to(rows.device)
    return torch.cat([values, values.new_full((missing,), fill)])


class PerSample:
    """A sum for each sample of a run. Samples are created when something is added to them."""

    def __init__(self) -> None:
        self._sums = torch.zeros(0, dtype=torch.float64)

    def add(self, rows: Tensor, amounts: Tensor | float) -> None:
        """Add amounts, [B] or one for all, to the samples `rows` [B], which may repeat."""
        self._sums = grow(self._sums, rows, 0.0)
        values = torch.as_tensor(amounts, dtype=torch.float64, device=rows.device).expand(len(rows))
        self._sums.index_add_(0, rows, values)

    def sums(self, count: int) -> Tensor:
        """Return the sums of samples 0 .. count-1, [count] float64; 0 where nothing was added."""
        sums = self._sums[:count]
        return torch.cat([sums, sums.new_zeros(count - len(sums))])


class Counting:
    """A denoiser that counts its evaluations, one for each row of each call: the total, and for each sample.

    Put it inside the guidance wrappers, so that the doubled batch of `classifier_free` counts two a sample.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.evaluations = 0
        self.per_sample = PerSample()
        """Counts by sample. Selections of a batch need `condition.numbered()`; otherwise row i counts as sample i."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.evaluations += x_t.shape[0]
        self.per_sample.add(get_rows(condition), 1.0)
        return self.denoiser(x_t, t, condition)


def get_rows(condition: Condition) -> Tensor:
    """Return the number of the sample that each row belongs to, [B] int64."""
    rows = condition.numbered().rows
    assert rows is not None
    return rows
