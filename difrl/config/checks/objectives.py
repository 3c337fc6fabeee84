"""Conflicts of objectives with the other parts of a recipe.

Each kind of objective has a check under its name in the schema; the other checks apply to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from difrl.config.checks.conflict import ConfigConflict
from difrl.config.schema.objective import (
    AnchoredPreferenceObjective,
    CentredObjective,
    ClipCovObjective,
    KLCovObjective,
    ObjectiveSection,
    PreferenceObjective,
    RatioNormalisedObjective,
)
from difrl.config.schema.run import RunSections


def check_objectives(config: RunSections) -> Iterator[ConfigConflict]:
    """Yield the settings that the objective cannot work with."""
    yield from _BY_KIND.get(config.objective.kind, _declared_by_section)(config, config.objective)
    yield from _mixtures_are_read(config)
    yield from _step_weights_have_single_decisions(config)
    yield from _bound_is_counted_once(config)


_OLD_DISTRIBUTION = "likelihood.old: recompute and snapshots: {old: {decay: 0.0}}"


def _declared_by_section(config: RunSections, objective: ObjectiveSection) -> Iterator[ConfigConflict]:
    for path, problem in objective.conflicts(config.likelihood, config.advantage):
        yield ConfigConflict(path, problem)


def _ratio_normalised(config: RunSections, objective: RatioNormalisedObjective) -> Iterator[ConfigConflict]:
    if config.likelihood.kind == "forward" and objective.bias == "closed_form":
        problem = "E[−log ρ] has no closed form for a forward likelihood; set bias: batch"
        yield ConfigConflict(("objective", "bias"), problem)
    if config.likelihood.kind == "tokens" and config.likelihood.old == "recorded" and objective.bias == "closed_form":
        problem = "KL(old‖θ) of a token needs the full old distribution, and only the ℓ of the token is recorded; set bias: batch"
        yield ConfigConflict(("objective", "bias"), f"{problem}, or {_OLD_DISTRIBUTION}")
    if config.likelihood.kind == "reverse" and objective.decisions != "each":
        problem = f"every step has its own scale, so the {objective.decisions} over the steps of a sample has none"
        yield ConfigConflict(("objective", "decisions"), f"{problem}; set decisions: each")


def _clip_cov(config: RunSections, objective: ClipCovObjective) -> Iterator[ConfigConflict]:
    yield from _policy_has_entropy(config, objective)
    if objective.lowest >= objective.highest:
        problem = f"found {objective.lowest:g}, and no covariance is above it and below {objective.highest:g}"
        yield ConfigConflict(("objective", "lowest"), f"{problem}; set lowest below highest")


def _kl_cov(config: RunSections, objective: KLCovObjective) -> Iterator[ConfigConflict]:
    yield from _policy_has_entropy(config, objective)
    if config.likelihood.old != "recompute":
        reasons = {
            "detach": "detach makes log ρ zero, so the penalty would have no effect",
            "recorded": "with a recorded ℓ_old the slope of |log ρ| at 0 would be the sign of a rounding error",
        }
        problem = reasons[config.likelihood.old]
        yield ConfigConflict(("likelihood", "old"), f"{problem}; set {_OLD_DISTRIBUTION}")


def _policy_has_entropy(config: RunSections, objective: ObjectiveSection) -> Iterator[ConfigConflict]:
    if config.likelihood.kind != "tokens":
        problem = (
            f"{objective.kind} restrains the decisions that reduce the entropy of θ, and under a {config.likelihood.kind} "
            "likelihood, whose noise is fixed, the entropy cannot fall"
        )
        yield ConfigConflict(("objective", "kind"), f"{problem}; set clipped, or likelihood.kind: tokens")


def _divergence_masked(config: RunSections, objective: ObjectiveSection) -> Iterator[ConfigConflict]:
    if config.likelihood.kind == "forward":
        problem = "the mask needs the exact KL from old, which a forward likelihood does not have"
        yield ConfigConflict(
            ("objective", "kind"), f"{problem}; set likelihood.kind: reverse, or objective.kind: clipped"
        )
    elif config.likelihood.kind == "tokens" and config.likelihood.old == "recorded":
        problem = "the mask needs KL(old‖θ) of full distributions, and only the ℓ of each token is recorded"
        yield ConfigConflict(("likelihood", "old"), f"{problem}; set {_OLD_DISTRIBUTION}")
    elif config.likelihood.old == "detach":
        problem = "detach makes the KL from old zero, so the mask would have no effect; set old: recorded"
        yield ConfigConflict(("likelihood", "old"), problem)


def _centred(config: RunSections, objective: CentredObjective) -> Iterator[ConfigConflict]:
    advantage = config.advantage
    if config.likelihood.kind == "tokens" and objective.decisions == "each":
        problem = "log-ratios are centred decision by decision, and token j of one text is not comparable with token j of another"
        yield ConfigConflict(("objective", "decisions"), f"{problem}; set sum, or mean to divide by the length")
    if objective.reward != "raw":
        return
    required: list[tuple[str, object, tuple[object, ...]]] = [
        ("baseline", advantage.baseline, ("none", "mean")),
        ("std", advantage.std, ("none",)),
        ("clip", advantage.clip, (None,)),
        ("scale", advantage.scale, (1.0,)),
        ("positive", advantage.positive, (1.0,)),
        ("negative", advantage.negative, (1.0,)),
    ]
    for key, found, allowed in required:
        if found not in allowed:
            expected = "null" if allowed[0] is None else allowed[0]
            problem = f"objective.reward: raw uses advantages as rewards, which {key}: {found} changes"
            yield ConfigConflict(("advantage", key), f"{problem}; set {key}: {expected}")


def _negative_aware(config: RunSections, objective: ObjectiveSection) -> Iterator[ConfigConflict]:
    if config.likelihood.kind != "forward":
        problem = f"mixtures of outputs need a forward likelihood, found likelihood.kind: {config.likelihood.kind}"
        yield ConfigConflict(
            ("objective", "kind"), f"{problem}; set likelihood.kind: forward, or objective.kind: clipped"
        )
    elif config.likelihood.mix is None:
        yield ConfigConflict(("likelihood", "mix"), "negative_aware needs the mixtures ℓ⁺ and ℓ⁻; set e.g. mix: 1.0")


def _preference(
    config: RunSections, objective: PreferenceObjective | AnchoredPreferenceObjective
) -> Iterator[ConfigConflict]:
    name, likelihood = objective.reference, config.likelihood
    known = list(dict.fromkeys(["base", "old", *config.snapshots]))
    if name not in known:
        problem = f"{name!r} is not a snapshot; expected {' or '.join(known)}, or declare it in snapshots"
        yield ConfigConflict(("objective", "reference"), problem)
    if name == "old" and likelihood.old == "detach":
        problem = "detach makes old the policy itself, so every Δ is zero; set likelihood.old: recompute"
        yield ConfigConflict(("objective", "reference"), f"{problem}, or reference: base")
    for key, factor in (("positive", config.advantage.positive), ("negative", config.advantage.negative)):
        if factor == 0:
            problem = "pairs are chosen by the order of advantages, which a factor of 0 removes"
            yield ConfigConflict(("advantage", key), f"{problem}; set a number above 0")
    if likelihood.kind == "tokens" and objective.decisions == "each":
        problem = "texts are compared as a whole: token j of one text is not comparable with token j of another"
        yield ConfigConflict(("objective", "decisions"), f"{problem}; set sum, or mean to divide by the length")
    if likelihood.kind != "forward" or objective.decisions != "each":
        return
    # Inversion determines the noise of each sample, so only t has to be shared.
    shared = ["t"] if likelihood.noise.kind == "inversion" else ["t", "noise"]
    if not set(shared) <= set(likelihood.share):
        problem = "samples are compared decision by decision, so a group must share its draws"
        yield ConfigConflict(
            ("likelihood", "share"), f"{problem}; set share: [{', '.join(shared)}], or objective.decisions: mean"
        )


def _mixtures_are_read(config: RunSections) -> Iterator[ConfigConflict]:
    likelihood = config.likelihood
    unread = likelihood.kind == "forward" and likelihood.mix is not None
    if unread and not config.objective.reads_mixtures:
        problem = f"{config.objective.kind} does not use mixtures; remove mix, or set objective.kind: negative_aware"
        yield ConfigConflict(("likelihood", "mix"), problem)


def _step_weights_have_single_decisions(config: RunSections) -> Iterator[ConfigConflict]:
    likelihood, decisions = config.likelihood, config.objective.reduction
    if likelihood.kind == "reverse" and likelihood.step_weight != "none" and decisions != "each":
        problem = f"weights of single steps have no meaning for the {decisions} over the steps of a sample"
        yield ConfigConflict(("likelihood", "step_weight"), f"{problem}; set none, or objective.decisions: each")


def _bound_is_counted_once(config: RunSections) -> Iterator[ConfigConflict]:
    likelihood = config.likelihood
    if likelihood.kind == "forward" and likelihood.weighting == "elbo" and config.objective.reduction == "sum":
        problem = (
            f"every decision of elbo estimates the full bound, so their sum counts it {likelihood.decisions} times"
        )
        yield ConfigConflict(("objective", "decisions"), f"{problem}; set decisions: mean")


_BY_KIND: Mapping[str, Callable[[RunSections, Any], Iterator[ConfigConflict]]] = {
    "ratio_normalised": _ratio_normalised,
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
    "divergence_masked": _divergence_masked,
    "centred": _centred,
    "negative_aware": _negative_aware,
    "preference": _preference,
    "anchored_preference": _preference,
}
