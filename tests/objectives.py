"""Every objective that difrl ships, in each of its shapes: what tests of the contract run over."""

from __future__ import annotations

from difrl.core import (
    AnchoredPreference,
    CentredRewardDistillation,
    Clipped,
    DivergenceMasked,
    NegativeAware,
    Objective,
    Preference,
    RatioNormalised,
)

OBJECTIVES: list[Objective] = [
    Clipped(0.1, 0.3),
    Clipped(None, None, decisions="mean"),
    CentredRewardDistillation(),
    CentredRewardDistillation(reward="raw", decisions="sum"),
    CentredRewardDistillation(temperature=0.5, decisions="mean"),
    CentredRewardDistillation(form="bce", temperature=0.2),
    NegativeAware(mix=0.7),
    NegativeAware(mix=0.7, decisions="mean"),
    Preference(decisions="sum"),
    Preference(divergence="jensen_shannon", flip=0.1, decisions="mean"),
    Preference(loss="squared", beta=0.5),
    AnchoredPreference(temperature=0.5),
    AnchoredPreference(reference="old", decisions="sum"),
    RatioNormalised(),
    RatioNormalised(bias="batch"),
    DivergenceMasked(0.02),
]
