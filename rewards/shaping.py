"""Transformations of a reward before it is summed: bounds, comparison with reference samples, correction of known noise.

Every function takes scores of B samples and returns scores of the same samples. Invalid rows stay invalid, and a row
without a valid reference becomes invalid. No function changes the order of two samples of a prompt; `clip` may make them
equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewards.base import Scores


def clip(scores: Scores, *, low: float | None = None, high: float | None = None) -> Scores:
    """Return min(max(r, low), high). None means no bound."""
    if low is None and high is None:
        raise ValueError("clip has neither low nor high; give at least one")
    if low is not None and high is not None and low >= high:
        raise ValueError(f"clip has low {low:g} and high {high:g}; low must be below high")
    return _mask_invalid(scores.values.clamp(low, high), _check_scores(scores))


def min_max(scores: Scores, *, low: float, high: float) -> Scores:
    """Return (r - low) / (high - low): low becomes 0 and high 1. Values outside are not clipped."""
    if low >= high:
        raise ValueError(f"min_max has low {low:g} and high {high:g}; low must be below high")
    return _mask_invalid((scores.values - low) / (high - low), _check_scores(scores))


def min_max_of_groups(scores: Scores, groups: Tensor) -> Scores:
    """Return (r - min) / (max - min) over the valid samples of each group, in [0, 1]; 0 in a group of equal rewards.

    Args:
      groups: [B] ids.
    """
    valid = _check_scores(scores)
    ids, index = groups.unique(return_inverse=True)
    empty = scores.values.new_zeros(len(ids))
    infinity = torch.full_like(scores.values, torch.inf)
    low = empty.scatter_reduce(0, index, torch.where(valid, scores.values, infinity), "amin", include_self=False)
    high = empty.scatter_reduce(0, index, torch.where(valid, scores.values, -infinity), "amax", include_self=False)
    spread = (high - low)[index]
    return _mask_invalid((scores.values - low[index]) / torch.where(spread > 0, spread, 1.0), valid)


def par(scores: Scores, references: Scores) -> Scores:
    """Return the preference as reward (2502.18770): the mean over M reference samples of sigmoid(r - r_ref), in (0, 1).

    It is the probability, under a Bradley-Terry reward, that the sample is preferred to one of the references. These are
    samples of the same prompt from the initial model. Published with M = 5 and less; according to the paper, M = 1 is
    sufficient.

    Args:
      references: [B, M]; invalid ones are ignored.
    """
    margins = scores.values[:, None] - _reference_values(scores, references)
    shaped = margins.sigmoid().nanmean(dim=1).to(scores.values.dtype)
    return _mask_invalid(shaped, _check_scores(scores) & references.valid.any(dim=1))


def log_sigmoid(scores: Scores, references: Scores, *, quantile: float | None = 0.85) -> Scores:
    """Return the log-sigmoid centred transformation (2402.00742): log sigmoid(r - r_ref), below 0.

    r_ref is this quantile of the rewards of M reference samples of the prompt (published: 0.85); with None it is their
    mean. A sum over several rewards is the logarithm of a product of probabilities, which is small unless all of them are
    large: a logical AND.

    Args:
      references: [B, M]; invalid ones are ignored.
    """
    if quantile is not None and not 0 <= quantile <= 1:
        raise ValueError(f"quantile is {quantile:g}, expected a number from 0 to 1, or None for the mean")
    values = _reference_values(scores, references)
    centre = values.nanmean(dim=1) if quantile is None else values.nanquantile(quantile, dim=1)
    shaped = torch.nn.functional.logsigmoid(scores.values - centre).to(scores.values.dtype)
    return _mask_invalid(shaped, _check_scores(scores) & references.valid.any(dim=1))


def denoised(scores: Scores, *, false_positive: float, false_negative: float) -> Scores:
    """Return the backward correction of a verifier with known error rates (2510.00915): (r - rho_0) / (1 - rho_0 - rho_1).

    r in {0, 1} is the verifier's result, rho_0 = P(r = 1 | wrong) and rho_1 = P(r = 0 | right). The expectation over its
    errors is the result of a perfect verifier. The map is affine, so it has no effect on advantages that are centred and
    divided by a standard deviation. (The forward correction is a weighting of advantages: `scale_by_sign` in
    difrl/core/advantages.py.)
    """
    if not (false_positive >= 0 and false_negative >= 0 and false_positive + false_negative < 1):
        raise ValueError(
            f"the rates are {false_positive:g} (false positive) and {false_negative:g} (false negative); expected both at "
            "least 0 and their sum below 1: at 1 a verifier's result has no information, and above 1 it is inverted"
        )
    valid = _check_scores(scores)
    results = scores.values[valid]
    if not ((results == 0) | (results == 1)).all():
        other = float(results[(results != 0) & (results != 1)][0])
        raise ValueError(f"a verifier returns 0 or 1, found {other:g}; other results have no error rates")
    return _mask_invalid((scores.values - false_positive) / (1 - false_positive - false_negative), valid)


def _check_scores(scores: Scores) -> Tensor:
    """Return `scores.valid`. Raise ValueError unless valid values are finite."""
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


def _reference_values(scores: Scores, references: Scores) -> Tensor:
    """Return the references' values [B, M] in float64, NaN where they are invalid.

    The caller's arithmetic should be in float64: in the rewards' own precision, results of equal rewards could differ by an
    ulp, and their group would seem to have a spread.
    """
    valid, found = _check_scores(references), list(references.values.shape)
    if references.values.ndim != 2 or found[0] != len(scores.values) or found[1] == 0:
        raise ValueError(
            f"references are {found}, expected at least one for each of {len(scores.values)} samples: [B, M]"
        )
    return torch.where(valid, references.values, torch.nan).to(scores.values.device, torch.float64)


def _mask_invalid(values: Tensor, valid: Tensor) -> Scores:
    return Scores(torch.where(valid, values, 0.0), valid)
