"""Every objective that difrl ships, in each of its forms, for the tests of the contract."""

from __future__ import annotations

from difrl.core import (
    AnchoredPreference,
    CentredRewardDistillation,
    ClipCov,
    Clipped,
    DivergenceMasked,
    KLCov,
    NegativeAware,
    Objective,
    Preference,
    RatioNormalised,
)

OBJECTIVES: list[Objective] = [
    Clipped(0.1, 0.3),
    Clipped(0.2, 0.28, dual=1.5),
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
    ClipCov(0.1, 0.3, share=0.2, lowest=-0.2, highest=0.5),
    ClipCov(None, None, share=0.3, lowest=0.0, highest=5.0, decisions="sum"),
    KLCov(share=0.3),
    KLCov(share=0.3, coefficient=0.5, decisions="mean"),
    DivergenceMasked(0.02),
]
