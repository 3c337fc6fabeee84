"""Combinations of several rewards of the same samples: the weighted sum, and ensembles of estimates of one quantity.

Members are scores [K, B] of K rewards. A row is valid if all members that count are valid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rewards.base import Scores


def stack(members: Sequence[Scores]) -> Scores:
    """Return K scores of shape [B] as one of shape [K, B]."""
    if not members:
        raise ValueError("there is nothing to combine; give at least one member")
    return Scores(torch.stack([m.values for m in members]), torch.stack([m.valid for m in members]))


def concatenate(parts: Sequence[Scores]) -> Scores:
    """Return the scores of successive rows as one of shape [B]."""
    return Scores(torch.cat([part.values for part in parts]), torch.cat([part.valid for part in parts]))


def weighted_sum(members: Scores, weights: Sequence[float]) -> Scores:
    """Return sum_k w_k r_k. A member of weight 0 does not count: rows that only it cannot score are valid."""
    if len(weights) != len(members.values):
        raise ValueError(f"{len(weights)} weights for {len(members.values)} members; give one for each")
    w = torch.tensor(weights, dtype=members.values.dtype, device=members.values.device)[:, None]
    valid = (_check_members(members) | (w == 0)).all(dim=0)
    filled = torch.where(members.valid, members.values, 0.0)
    return Scores(torch.where(valid, (w * filled).sum(dim=0), 0.0), valid)


def mean(members: Scores) -> Scores:
    """Return mean_k r_k."""
    return _valid_in_all(members, members.values.mean(dim=0))


def worst(members: Scores) -> Scores:
    """Return min_k r_k: worst-case optimisation, WCO (2310.02743)."""
    return _valid_in_all(members, members.values.amin(dim=0))


def uncertainty(members: Scores, *, penalty: float) -> Scores:
    """Return mean_k r_k - penalty var_k r_k: uncertainty-weighted optimisation, UWO (2310.02743).

    The variance divides by K. It grows with the square of the rewards' scale, so the penalty has to match that scale.
    """
    if penalty < 0:
        raise ValueError(f"penalty is {penalty:g}, expected 0 or more: below it disagreement would be rewarded")
    return _valid_in_all(members, members.values.mean(dim=0) - penalty * members.values.var(dim=0, correction=0))


def _valid_in_all(members: Scores, values: torch.Tensor) -> Scores:
    """Return scores that are valid where all members are."""
    valid = _check_members(members).all(dim=0)
    return Scores(torch.where(valid, values, 0.0), valid)


def _check_members(members: Scores) -> torch.Tensor:
    """Return `members.valid`. Raise ValueError unless the shapes are [K, B] and valid values are finite."""
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
