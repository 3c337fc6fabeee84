"""Statistics within groups: rows that share a prompt, or form a pair, share a group id.

Ids are any int64 values in any order; the rows of a group need not be neighbours. Results are broadcast back
to the rows. Sums run in float64, so that float32 results do not depend on the order of the rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def group_index(groups: Tensor) -> tuple[Tensor, int]:
    """Number the groups: ids [B] -> (index [B] in 0..G-1, G)."""
    if groups.ndim != 1 or groups.is_floating_point():
        raise ValueError(
            f"groups are {groups.dtype} of shape {list(groups.shape)}, expected int64 [B], one id a sample"
        )
    unique, index = torch.unique(groups, return_inverse=True)
    return index, unique.shape[0]


def group_sum(groups: Tensor, x: Tensor) -> Tensor:
    """Return sum_{k in group(i)} x_k for every row i. groups [B], x [B, ...] -> [B, ...], float64."""
    index, number = group_index(groups)
    if x.shape[:1] != groups.shape:
        raise ValueError(f"x has shape {list(x.shape)}, expected {groups.shape[0]} rows, one for each group id")
    values = x.to(torch.float64)
    return values.new_zeros(number, *x.shape[1:]).index_add(0, index, values)[index]


def group_mean(groups: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return sum_k w_k x_k / sum_k w_k over the group of every row; 0 where a group has no weight.

    Args:
      groups: [B] ids.
      x: [B, ...]; values with weight 0 (padding, NaN) have no effect.
      weights: in the shape of x, non-negative: a bool mask, or for example exp(reward / temperature). None weighs
        all values equally.

    Returns:
      in the shape and dtype of x (float32 where x is not floating point).
    """
    w = torch.ones_like(x, dtype=torch.float64) if weights is None else weights.to(torch.float64)
    total = group_sum(groups, torch.where(w > 0, x.to(torch.float64) * w, 0.0))
    mass = group_sum(groups, w)
    return _cast_like(torch.where(mass > 0, total / mass, 0.0), x)


def group_mean_std(groups: Tensor, x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and population standard deviation (dividing by n, as numpy.std) over the group of every row.

    Arguments and shapes as in `group_mean`.
    """
    values = x.to(torch.float64)
    mean = group_mean(groups, values, weights)
    variance = group_mean(groups, (values - mean).square(), weights)
    return _cast_like(mean, x), _cast_like(variance.sqrt(), x)


def group_spread(groups: Tensor, x: Tensor, valid: Tensor) -> Tensor:
    """Return max - min of the valid x over the group of every row, 0 for a group without any. x, valid [B] -> [B].

    It is exactly 0 for a group of equal values, unlike a standard deviation in floating point.
    """
    index, number = group_index(groups)
    inf = torch.tensor(torch.inf, dtype=torch.float64, device=x.device)
    values = x.to(torch.float64)
    high = values.new_full((number,), -torch.inf).scatter_reduce(0, index, torch.where(valid, values, -inf), "amax")
    low = values.new_full((number,), torch.inf).scatter_reduce(0, index, torch.where(valid, values, inf), "amin")
    return (high - low).clamp(min=0.0)[index]


def group_logsumexp(groups: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Return log sum_k exp(x_k) over the unmasked x of the group of every row, 0 for a group without any.

    groups [B], x and mask [B, ...] -> [B, ...], float64.
    """
    high = _group_max(groups, x, mask)
    mass = group_sum(groups, torch.where(mask, (x.to(torch.float64) - high).exp(), 0.0))
    return torch.where(mass > 0, high + mass.clamp(min=1.0).log(), 0.0)


def group_softmax(groups: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Return exp(x_i) / sum_k exp(x_k) over the unmasked x of the group, 0 where masked. Shapes as `group_logsumexp`."""
    return torch.where(mask, (x.to(torch.float64) - group_logsumexp(groups, x, mask)).exp(), 0.0)


def group_first_max(groups: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Return True at one row of each group and column: the first row with the largest unmasked x.

    groups [B], x and mask [B, ...] -> bool [B, ...]. A group without an unmasked x has no such row.
    """
    largest = mask & (x == _group_max(groups, x, mask))
    rows = torch.arange(len(x), device=x.device).reshape(-1, *[1] * (x.ndim - 1)).expand_as(x)
    first = -_group_max(groups, -rows, largest)
    return largest & (rows == first)


def _group_max(groups: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Return the maximum of the unmasked x over the group of every row, float64; 0 for a group without any."""
    index, number = group_index(groups)
    values = torch.where(mask, x.to(torch.float64), -torch.inf)
    place = index.reshape(-1, *[1] * (x.ndim - 1)).expand_as(x)
    high = values.new_full((number, *x.shape[1:]), -torch.inf).scatter_reduce(0, place, values, "amax")[index]
    return torch.where(high.isneginf(), 0.0, high)


def _cast_like(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype if x.is_floating_point() else torch.float32)


def mean_and_stderr(values: Tensor) -> tuple[float, float]:
    """Return mean and standard error of the finite values. Rows that could not be scored are NaN and are left out."""
    values = values[values.isfinite()].double()
    if len(values) == 0:
        return math.nan, math.nan
    stderr = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(math.nan)
    return values.mean().item(), float(stderr)
