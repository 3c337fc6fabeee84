"""What a reward is turned into before it is summed: bounded, compared with reference samples, or freed of known noise.

Every function takes scores of B samples and returns scores of the same samples. An invalid row stays invalid, and so
becomes one that has nothing to be compared with. None puts two samples of a prompt in another order, though `clip` may
make them equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewards.base import Scores


def clip(scores: Scores, *, low: float | None = None, high: float | None = None) -> Scores:
    """min(max(r, low), high); a bound that is None is none."""
    if low is None and high is None:
        raise ValueError("clip has neither low nor high; give at least one")
    if low is not None and high is not None and low >= high:
        raise ValueError(f"clip has low {low:g} and high {high:g}; low must be below high")
    return _kept(scores.values.clamp(low, high), _checked(scores))


def min_max(scores: Scores, *, low: float, high: float) -> Scores:
    """(r - low) / (high - low): low becomes 0 and high 1, and what lies beyond is not cut off."""
    if low >= high:
        raise ValueError(f"min_max has low {low:g} and high {high:g}; low must be below high")
    return _kept((scores.values - low) / (high - low), _checked(scores))


def min_max_of_groups(scores: Scores, groups: Tensor) -> Scores:
    """(r - min) / (max - min) over the valid samples of each group, in [0, 1]; 0 in a group whose samples all agree.

    Args:
      groups: [B] ids.
    """
    valid = _checked(scores)
    ids, index = groups.unique(return_inverse=True)
    empty = scores.values.new_zeros(len(ids))
    infinity = torch.full_like(scores.values, torch.inf)
    low = empty.scatter_reduce(0, index, torch.where(valid, scores.values, infinity), "amin", include_self=False)
    high = empty.scatter_reduce(0, index, torch.where(valid, scores.values, -infinity), "amax", include_self=False)
    spread = (high - low)[index]
    return _kept((scores.values - low[index]) / torch.where(spread > 0, spread, 1.0), valid)


def par(scores: Scores, references: Scores) -> Scores:
    """Preference as reward (2502.18770): the mean over M reference samples of sigmoid(r - r_ref), in (0, 1).

    The probability, under a Bradley-Terry reward, that the sample is preferred to one of the references: samples of the
    same prompt by the model that training starts from. Published with M = 5 and less; M = 1 is said to do.

    Args:
      references: [B, M]; those that are not valid are left out.
    """
    margins = scores.values[:, None] - _filled(scores, references)
    shaped = margins.sigmoid().nanmean(dim=1).to(scores.values.dtype)
    return _kept(shaped, _checked(scores) & references.valid.any(dim=1))


def log_sigmoid(scores: Scores, references: Scores, *, quantile: float | None = 0.85) -> Scores:
    """The log-sigmoid centred transformation (2402.00742): log sigmoid(r - r_ref), below 0.

    r_ref is this quantile of the rewards of M reference samples of the prompt (published: 0.85), or, where it is None,
    their mean. A sum over rewards is the logarithm of a product of probabilities, which is small unless all are large: a
    logical AND.

    Args:
      references: [B, M]; those that are not valid are left out.
    """
    if quantile is not None and not 0 <= quantile <= 1:
        raise ValueError(f"quantile is {quantile:g}, expected a number from 0 to 1, or None for the mean")
    filled = _filled(scores, references)
    centre = filled.nanmean(dim=1) if quantile is None else filled.nanquantile(quantile, dim=1)
    shaped = torch.nn.functional.logsigmoid(scores.values - centre).to(scores.values.dtype)
    return _kept(shaped, _checked(scores) & references.valid.any(dim=1))


def denoised(scores: Scores, *, false_positive: float, false_negative: float) -> Scores:
    """The backward correction of a verifier that errs at known rates (2510.00915): (r - rho_0) / (1 - rho_0 - rho_1).

    r in {0, 1} is what the verifier says, rho_0 = P(r = 1 | wrong) and rho_1 = P(r = 0 | right). The expectation over its
    errors is what a perfect verifier would say. The map is affine, so advantages that are centred and divided by a
    standard deviation do not see it. (The forward correction is a weighting of advantages: `reweighted` in
    difrl/core/advantages.py.)
    """
    if not (false_positive >= 0 and false_negative >= 0 and false_positive + false_negative < 1):
        raise ValueError(
            f"the rates are {false_positive:g} (false positive) and {false_negative:g} (false negative); expected both at "
            "least 0 and their sum below 1, beyond which a verifier says nothing, or the opposite"
        )
    valid = _checked(scores)
    said = scores.values[valid]
    if not ((said == 0) | (said == 1)).all():
        other = float(said[(said != 0) & (said != 1)][0])
        raise ValueError(f"a verifier says 0 or 1, found {other:g}; its errors have rates only then")
    return _kept((scores.values - false_positive) / (1 - false_positive - false_negative), valid)


def _checked(scores: Scores) -> Tensor:
    """Which rows are valid, where all that are hold finite numbers."""
    if scores.values.shape != scores.valid.shape or scores.valid.dtype != torch.bool:
        found = f"values {list(scores.values.shape)} and {scores.valid.dtype} valid {list(scores.valid.shape)}"
        raise ValueError(f"scores have {found}, expected one shape and torch.bool")
    broken = (scores.valid & ~scores.values.isfinite()).nonzero()
    if len(broken):
        place = broken[0].tolist()
        raise ValueError(
            f"the score at {place} is {float(scores.values[tuple(place)])} but marked valid; mark it invalid"
        )
    return scores.valid


def _filled(scores: Scores, references: Scores) -> Tensor:
    """The references' values [B, M], NaN where they are not valid.

    In float64, in which what is made of them should be reckoned: in the rewards' own precision, samples of one reward could
    come out an ulp apart, and their group would seem to differ.
    """
    valid, found = _checked(references), list(references.values.shape)
    if references.values.ndim != 2 or found[0] != len(scores.values) or found[1] == 0:
        raise ValueError(
            f"references are {found}, expected at least one for each of {len(scores.values)} samples: [B, M]"
        )
    return torch.where(valid, references.values, torch.nan).to(scores.values.device, torch.float64)


def _kept(values: Tensor, valid: Tensor) -> Scores:
    return Scores(torch.where(valid, values, 0.0), valid)
