"""From the objective section of a recipe to the objective of the core that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from difrl.config import (
    AnchoredPreferenceObjective,
    CentredObjective,
    ClipCovObjective,
    ClippedObjective,
    DivergenceMaskedObjective,
    KLCovObjective,
    NegativeAwareObjective,
    PreferenceObjective,
    RatioNormalisedObjective,
    RunConfig,
)
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

_REFERENCES = "references/"


def objective_of(config: RunConfig) -> Objective:
    """The objective of a run."""
    return _BUILDERS[type(config.objective)](config, config.objective)


def references_read(objective: Objective) -> set[str]:
    """The names of the references an objective reads, "old" among them where it does."""
    return {name.removeprefix(_REFERENCES) for name in objective.needs if name.startswith(_REFERENCES)}


def _clipped(config: RunConfig, section: ClippedObjective) -> Objective:
    return Clipped(section.clip_low, section.clip_high, decisions=section.decisions)


def _clip_cov(config: RunConfig, section: ClipCovObjective) -> Objective:
    bounds = (section.clip_low, section.clip_high)
    return ClipCov(*bounds, section.share, section.lowest, section.highest, decisions=section.decisions)


def _ratio_normalised(config: RunConfig, section: RatioNormalisedObjective) -> Objective:
    return RatioNormalised(section.clip_low, section.clip_high, section.bias, decisions=section.decisions)


def _negative_aware(config: RunConfig, section: NegativeAwareObjective) -> Objective:
    assert config.likelihood.kind == "forward"  # difrl/config/checks/ refuses the others
    assert config.likelihood.mix is not None
    return NegativeAware(config.likelihood.mix, section.bound)


def _fields_of(objective: Callable[..., Objective]) -> Callable[[RunConfig, Any], Objective]:
    """The builder of an objective whose fields are the keys of its section."""
    return lambda config, section: objective(**section.model_dump(exclude={"kind"}))


_BUILDERS: Mapping[type, Callable[[RunConfig, Any], Objective]] = {
    ClippedObjective: _clipped,
    RatioNormalisedObjective: _ratio_normalised,
    ClipCovObjective: _clip_cov,
    KLCovObjective: _fields_of(KLCov),
    DivergenceMaskedObjective: _fields_of(DivergenceMasked),
    CentredObjective: _fields_of(CentredRewardDistillation),
    NegativeAwareObjective: _negative_aware,
    PreferenceObjective: _fields_of(Preference),
    AnchoredPreferenceObjective: _fields_of(AnchoredPreference),
}
