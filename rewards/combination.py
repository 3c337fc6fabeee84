"""Several rewards of the same samples made one: their weighted sum, or an ensemble of estimates of one thing.

Members are scores [K, B] of K rewards. A row is valid if all members that matter are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rewards.base import Scores


def stacked(members: Sequence[Scores]) -> Scores:
    """Scores [B] of K rewards as [K, B]."""
    if not members:
        raise ValueError("there is nothing to combine; give at least one member")
    return Scores(torch.stack([m.values for m in members]), torch.stack([m.valid for m in members]))


def weighted_sum(members: Scores, weights: Sequence[float]) -> Scores:
    """sum_k w_k r_k. A member of weight 0 has no part, so that what it cannot score is valid all the same."""
    if len(weights) != len(members.values):
        raise ValueError(f"{len(weights)} weights for {len(members.values)} members; give one for each")
    w = torch.tensor(weights, dtype=members.values.dtype, device=members.values.device)[:, None]
    valid = (_valid(members) | (w == 0)).all(dim=0)
    return Scores(torch.where(valid, (w * _zeroed(members)).sum(dim=0), 0.0), valid)


def mean(members: Scores) -> Scores:
    """mean_k r_k."""
    return _of_all(members, members.values.mean(dim=0))


def worst(members: Scores) -> Scores:
    """Worst-case optimisation, WCO (2310.02743): min_k r_k."""
    return _of_all(members, members.values.amin(dim=0))


def uncertainty(members: Scores, *, penalty: float) -> Scores:
    """Uncertainty-weighted optimisation, UWO (2310.02743): mean_k r_k - penalty var_k r_k.

    The variance divides by K. It grows with the square of the rewards' scale, so a penalty belongs to a scale.
    """
    if penalty < 0:
        raise ValueError(f"penalty is {penalty:g}, expected 0 or more: below it disagreement would be rewarded")
    return _of_all(members, members.values.mean(dim=0) - penalty * members.values.var(dim=0, correction=0))


def _of_all(members: Scores, values: torch.Tensor) -> Scores:
    valid = _valid(members).all(dim=0)
    return Scores(torch.where(valid, values, 0.0), valid)


def _zeroed(members: Scores) -> torch.Tensor:
    return torch.where(members.valid, members.values, 0.0)


def _valid(members: Scores) -> torch.Tensor:
    if members.values.ndim != 2 or members.valid.shape != members.values.shape or len(members.values) == 0:
        shapes = f"{list(members.values.shape)} and {list(members.valid.shape)}"
        raise ValueError(f"members have values and valid of {shapes}, expected [K, B] in both, K at least 1")
    broken = (members.valid & ~members.values.isfinite()).nonzero()
    if len(broken):
        k, row = broken[0].tolist()
        raise ValueError(
            f"member {k} scores row {row} {float(members.values[k, row])} but marks it valid; mark it invalid"
        )
    return members.valid
