"""The distance of a ratio from 1 and the range at which an objective clips, by hand and as a property."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difrl.core import (
    AnchoredPreference,
    CentredRewardDistillation,
    ClipCov,
    Clipped,
    DivergenceMasked,
    KLCov,
    Likelihoods,
    NegativeAware,
    Objective,
    Preference,
    RatioNormalised,
)
from tests.objectives import OBJECTIVES

MASK = torch.ones(1, 1, dtype=torch.bool)


def at(log_ratio: float, **terms: float) -> Likelihoods:
    """Return one decision with this log ratio to every reference."""
    values = {"references/old": 0.0, "references/base": 0.0, "scale": 0.5, "bias": 0.0, **terms}
    return Likelihoods(torch.full((1, 1), log_ratio), MASK, {k: torch.full((1, 1), v) for k, v in values.items()})


@pytest.mark.parametrize(
    ("objective", "clip_range", "excursion"),
    [
        (Clipped(0.1, 0.3), 0.1, 0.05),
        (Clipped(3e-4, 2e-4), 2e-4, 0.05),
        (Clipped(None, 0.3), 0.3, 0.05),
        (Clipped(None, None), 1.0, 0.05),
        (Clipped(10.0, 3.0), 1.0, 0.05),
        (Clipped(0.2, 0.28, dual=1.1), 0.1, 0.05),
        (ClipCov(0.2, 0.1), 0.1, 0.05),
        (KLCov(), 1.0, 0.05),
        (NegativeAware(), 1.0, 0.05),
        (RatioNormalised(0.2, 2e-6), 2e-6, math.sqrt(1.05) * math.exp(0.01) - 1),
        (RatioNormalised(0.2, 0.1, bias="batch"), 0.1, math.sqrt(1.05) - 1),
        (DivergenceMasked(1e-5), 1e-5, 0.02),
        (Preference(beta=2500.0), 1 / 2500, math.log(1.05)),
        (Preference(beta=0.5, loss="squared"), 1.0, math.log(1.05)),
        (AnchoredPreference(temperature=0.5), 0.5, math.log(1.05)),
        (CentredRewardDistillation(beta=2.0), 0.5, math.log(1.05)),
    ],
)
def test_by_hand(objective: Objective, clip_range: float, excursion: float) -> None:
    """At ρ = 1.05, with scale 1/2 and bias 0.02."""
    assert objective.clip_range == pytest.approx(clip_range)
    assert float(objective.excursion(at(math.log(1.05), bias=0.02))) == pytest.approx(excursion, rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_there_is_no_excursion_at_old(objective: Objective) -> None:
    assert float(objective.excursion(at(0.0))) == 0.0 < objective.clip_range


@given(st.floats(-1.0, 1.0), st.floats(0.01, 0.9), st.floats(0.01, 0.9), st.sampled_from([1.0, -1.0]))
def test_within_its_range_nothing_is_clipped(log_ratio: float, low: float, high: float, advantage: float) -> None:
    for objective in (Clipped(low, high), RatioNormalised(low, high)):
        lik = at(log_ratio)
        metrics = objective(lik, torch.tensor([advantage]), torch.zeros(1, dtype=torch.long))[1]
        if float(objective.excursion(lik)) < objective.clip_range:
            assert float(metrics["clip_low"] + metrics["clip_high"]) == 0.0
