"""Advantages from rewards: how much better a sample is than the others of its group.

Rows whose reward is not valid (it could not be scored) have no part in any statistic and get 0. Nothing here
needs a model, so all tensors may be gathered over processes first; then the result does not depend on the number
of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from difrl.core.groups import group_index, group_mean_std, group_spread, group_sum

Baseline = Literal["mean", "leave_one_out", "none"]
Std = Literal["group", "global", "beta", "none"]


def advantages(
    rewards: Tensor,
    groups: Tensor,
    valid: Tensor,
    *,
    baseline: Baseline = "mean",
    std: Std = "group",
    clip: float | None = None,
    scale: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    """Return A_i = scale * clip((r_i - b_i) / (s_i + eps), -clip, clip).

      baseline "mean":           b_i = mean of the group
               "leave_one_out":  b_i = mean of the group's other samples (RLOO, 2402.14740)
               "none":           b_i = 0
      std      "group":          s_i = standard deviation of the group (GRPO, 2402.03300)
               "global":         s_i = standard deviation of all rewards of the batch (an option of Flow-GRPO,
                                 2505.05470)
               "beta":           f(p) without eps, f the density of Beta(1 + a/3, 1 + b/3), p the mean of the group,
                                 (a, b) fitted to the means of all groups; rewards in [0, 1] (BNPO, 2506.02864)
               "none":           no division (Dr.GRPO, 2503.20783)

    Standard deviations divide by n. A group whose rewards are all equal, or with one valid sample, carries no
    information and gets exactly 0. Plain REINFORCE, with baseline "none", compares no groups: with std "none" every
    reward counts as it is, and with std "global" only a batch whose rewards are all equal gets 0. clip = 5 with
    scale = 1/5 is AWM's setting (2509.25050).

    Args:
      rewards: [B].
      groups: [B] ids, whole groups.
      valid: [B] bool.

    Returns:
      [B] detached, in the dtype of rewards.
    """
    _check(rewards, groups, valid)
    r = torch.where(valid, rewards.detach().to(torch.float64), 0.0)
    mean, group_std = group_mean_std(groups, r, valid)
    if baseline == "mean":
        centred = r - mean
    elif baseline == "leave_one_out":
        n = group_sum(groups, valid)
        centred = (r - mean) * n / (n - 1).clamp(min=1)
    elif baseline == "none":
        centred = r
    else:
        raise ValueError(f"baseline is {baseline!r}, expected 'mean', 'leave_one_out' or 'none'")
    scaled = centred / _divisor(r, groups, valid, group_std, std, eps)
    if clip is not None:
        scaled = scaled.clamp(-clip, clip)
    counts = valid
    if not (baseline == "none" and std == "none"):
        compared = torch.zeros_like(groups) if baseline == "none" and std == "global" else groups
        counts = valid & informative(rewards, compared, valid)
    return torch.where(counts, scaled * scale, 0.0).to(rewards.dtype)


def gdpo_advantages(
    columns: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    valid: Tensor,
    *,
    baseline: Baseline = "mean",
    clip: float | None = None,
    scale: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    """Normalise each reward within its group, sum by weight, and normalise the sum over the batch (GDPO, 2601.05242).

        S_i = sum_k w_k A_ik,    A_ik = the advantage of reward k, divided by its standard deviation in the group
        A_i = scale * clip((S_i - mean S) / (std S + eps), -clip, clip)

    The influence of a reward is its weight, whatever its spread. The mean of S is 0 except for rounding, since the A_ik
    of a group sum to 0; where no reward of a group differs, A_i is exactly 0. A reward of weight 0 has no part: its
    column may be NaN in valid rows, and a group that differs in it alone gets exactly 0.

    Args:
      columns: reward name -> [B]; values where valid is False have no effect.
      weights: for the same names.
      groups, valid: as in `advantages`.
    """
    names = list(columns)
    if not names or names != list(weights):
        raise ValueError(f"columns are {names} and weights {list(weights)}, expected the same names, at least one")
    used = {name: torch.where(valid, column, 0.0) for name, column in columns.items() if weights[name] != 0}
    if not used:
        return torch.zeros_like(columns[names[0]])
    parts = [weights[name] * advantages(r, groups, valid, baseline=baseline, eps=eps) for name, r in used.items()]
    total = torch.stack(parts).sum(0)
    differs = torch.stack([informative(r, groups, valid) for r in used.values()]).any(0)
    scaled = advantages(total, torch.zeros_like(groups), valid, std="group", clip=clip, scale=scale, eps=eps)
    return torch.where(differs, scaled, 0.0)


def scale_by_sign(advantages: Tensor, positive: float, negative: float) -> Tensor:
    """Multiply A by `positive` where A > 0 and by `negative` where A < 0. Any shape.

    For rewards of +1 and -1 without a baseline: positive = 0 is NSR, negative = 0 is PSR, and positive = 0.1 is the
    weighted REINFORCE of 2506.01347. There positive = rho_1 and negative = 1 - rho_1 are the forward correction of a
    verifier with false negatives at rate rho_1 (2510.00915). The results rho_1 and rho_1 - 1 have the expectation
    (1 - rho_0 - rho_1) (r - 1) over the verifier's errors, where r is the true label. The rate of false positives rho_0
    need not be known.
    """
    return torch.where(advantages > 0, advantages * positive, advantages * negative)


def informative(rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """Return True on every row (valid or not) of a group with two different valid rewards. [B] each -> bool [B]."""
    _check(rewards, groups, valid)
    return group_spread(groups, rewards.detach(), valid) > 0


def _divisor(r: Tensor, groups: Tensor, valid: Tensor, group_std: Tensor, std: Std, eps: float) -> Tensor:
    if std == "group":
        return group_std + eps
    if std == "global":
        return group_mean_std(torch.zeros_like(valid, dtype=torch.int64), r, valid)[1] + eps
    if std == "beta":
        return _beta_density(r, groups, valid)
    if std == "none":
        return torch.ones_like(r)
    raise ValueError(f"std is {std!r}, expected 'group', 'global', 'beta' or 'none'")


def _beta_density(r: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """Return f(p) for every row, p its group's mean and f the density of Beta(1 + a/3, 1 + b/3) (2506.02864).

    (a, b) by moments: a = c m, b = c (1 - m), c = m (1 - m) / v - 1, with mean m and unbiased variance v of the
    groups' means. As in the authors' code both parameters of f are at least 1, and f is at least 1e-6. Where the means
    do not vary, f is 1.
    """
    if not bool(((r >= 0) & (r <= 1))[valid].all()):
        low, high = float(r[valid].min()), float(r[valid].max())
        raise ValueError(
            f"rewards lie in [{low:g}, {high:g}], but std 'beta' needs them in [0, 1], ideally 0 or 1; rescale them "
            "by the rewards' weights, or use another std"
        )
    p = group_mean_std(groups, r, valid)[0]
    index, number = group_index(groups)
    counted = torch.zeros(number, dtype=torch.bool, device=r.device).index_put((index[valid],), valid[valid])
    means = r.new_zeros(number).index_put((index,), p)[counted]
    variance = means.var() if len(means) > 1 else means.new_zeros(())
    if variance == 0:
        return torch.ones_like(r)
    m = means.mean()
    c = m * (1 - m) / variance - 1
    alpha, beta = (1 + c * m / 3).clamp(min=1), (1 + c * (1 - m) / 3).clamp(min=1)
    log_norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return (torch.xlogy(alpha - 1, p) + torch.xlogy(beta - 1, 1 - p) - log_norm).exp().clamp(min=1e-6)


def _check(rewards: Tensor, groups: Tensor, valid: Tensor) -> None:
    if rewards.ndim != 1 or groups.shape != rewards.shape or valid.shape != rewards.shape:
        shapes = [list(x.shape) for x in (rewards, groups, valid)]
        raise ValueError(f"rewards, groups, valid have shapes {shapes}, expected one value a sample, [B], in each")
    if valid.dtype != torch.bool or not rewards.is_floating_point():
        raise ValueError(f"rewards are {rewards.dtype} and valid {valid.dtype}, expected floating point and torch.bool")
    if not torch.isfinite(rewards[valid]).all():
        row = int(torch.nonzero(valid & ~torch.isfinite(rewards))[0])
        raise ValueError(
            f"the reward of row {row} is {float(rewards[row])} but marked valid; expected a finite number, or valid = False"
        )
