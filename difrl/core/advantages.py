"""From rewards to advantages: how much better a sample did than the others of its group.

Rows whose reward is not valid (a scorer failed on them) are outside every statistic and get 0. Nothing here
touches a model, so all tensors may be gathered over processes first: then the result does not depend on how
many.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from difrl.core.groups import group_mean_std, group_spread, group_sum

Baseline = Literal["mean", "leave_one_out", "none"]
Std = Literal["group", "global", "none"]


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
    """A_i = scale * clip((r_i - b_i) / (s_i + eps), -clip, clip).

      baseline "mean":           b_i = mean of the group
               "leave_one_out":  b_i = mean of the group's other samples (RLOO, 2402.14740)
               "none":           b_i = 0
      std      "group":          s_i = standard deviation of the group (GRPO, 2402.03300)
               "global":         s_i = standard deviation of all rewards of the batch (an option of Flow-GRPO,
                                 2505.05470)
               "none":           no division (Dr.GRPO, 2503.20783), and eps plays no part

    Standard deviations divide by n. A group whose rewards all agree, or with one valid sample, says nothing:
    exactly 0 (but for baseline and std "none", plain REINFORCE). clip = 5 with scale = 1/5 is AWM's setting
    (2509.25050).

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
    scaled = centred / _divisor(r, valid, group_std, std, eps)
    if clip is not None:
        scaled = scaled.clamp(-clip, clip)
    plain = baseline == "none" and std != "group"
    kept = valid if plain else valid & informative(rewards, groups, valid)
    return torch.where(kept, scaled * scale, 0.0).to(rewards.dtype)


def informative(rewards: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """True on every row (valid or not) of a group with two different valid rewards. [B] each -> bool [B]."""
    _check(rewards, groups, valid)
    return group_spread(groups, rewards.detach(), valid) > 0


def _divisor(r: Tensor, valid: Tensor, group_std: Tensor, std: Std, eps: float) -> Tensor:
    if std == "group":
        return group_std + eps
    if std == "global":
        return group_mean_std(torch.zeros_like(valid, dtype=torch.int64), r, valid)[1] + eps
    if std == "none":
        return torch.ones_like(r)
    raise ValueError(f"std is {std!r}, expected 'group', 'global' or 'none'")


def _check(rewards: Tensor, groups: Tensor, valid: Tensor) -> None:
    if rewards.ndim != 1 or groups.shape != rewards.shape or valid.shape != rewards.shape:
        shapes = [list(x.shape) for x in (rewards, groups, valid)]
        raise ValueError(f"rewards, groups, valid have shapes {shapes}, expected one value a sample, [B], in each")
    if valid.dtype != torch.bool or not rewards.is_floating_point():
        raise ValueError(f"rewards are {rewards.dtype} and valid {valid.dtype}, expected floating point and torch.bool")
    if not torch.isfinite(rewards[valid]).all():
        row = int(torch.nonzero(valid & ~torch.isfinite(rewards))[0])
        raise ValueError(
            f"the reward of row {row} is {float(rewards[row])} but marked valid; mark it invalid or mend it"
        )
