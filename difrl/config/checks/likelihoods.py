"""Conflicts of likelihoods: times, weightings, inversion, the old weights."""

from __future__ import annotations

from collections.abc import Iterator

from difrl.config.checks.conflict import ConfigConflict
from difrl.config.schema.run import RunSections


def check_likelihoods(config: RunSections) -> Iterator[ConfigConflict]:
    """Yield the conflicts of this part of a config."""
    yield from _inversion_fits(config)
    yield from _times_in_order(config)
    yield from _elbo_is_defined(config)
    yield from _old_is_fixed_within_step(config)
    yield from _mixtures_have_old(config)


def _inversion_fits(config: RunSections) -> Iterator[ConfigConflict]:
    likelihood = config.likelihood
    if likelihood.kind != "forward" or likelihood.noise.kind != "inversion":
        return
    if likelihood.times.kind != "grid":
        problem = (
            f"inversion visits only the times of the sampler's grid, found {likelihood.times.kind}; set kind: grid"
        )
        yield ConfigConflict(("likelihood", "times", "kind"), problem)
    if "noise" in likelihood.share:
        problem = "inversion determines the noise of every sample, so it cannot be shared; set [] or [t]"
        yield ConfigConflict(("likelihood", "share"), problem)


def _times_in_order(config: RunSections) -> Iterator[ConfigConflict]:
    likelihood = config.likelihood
    if likelihood.kind == "forward" and likelihood.times.kind == "uniform":
        low, high = likelihood.times.low, likelihood.times.high
        if low >= high:
            problem = f"found low: {low:g} and high: {high:g}; low must be below high"
            yield ConfigConflict(("likelihood", "times", "low"), problem)


def _elbo_is_defined(config: RunSections) -> Iterator[ConfigConflict]:
    likelihood = config.likelihood
    if likelihood.kind != "forward" or likelihood.weighting != "elbo":
        return
    if likelihood.times.kind == "grid":
        problem = "weighting: elbo divides by the density of the times, and times on a grid have no density"
        yield ConfigConflict(("likelihood", "times", "kind"), f"{problem}; set uniform or logit_normal")
    if likelihood.error != "output":
        problem = f"weighting: elbo uses the error of the noise for every prediction type; found {likelihood.error}"
        yield ConfigConflict(("likelihood", "error"), f"{problem}, set output")


def _old_is_fixed_within_step(config: RunSections) -> Iterator[ConfigConflict]:
    likelihood, updates = config.likelihood, config.train.updates_per_step
    if updates > 1 and likelihood.old == "detach" and config.objective.measured_from == "old":
        better = "recorded" if likelihood.kind == "reverse" else "recompute and snapshots: {old: {decay: 0.0}}"
        problem = f"detach changes ℓ_old with each of the {updates} updates of a step; set {better}"
        yield ConfigConflict(("likelihood", "old"), problem)
    if likelihood.old == "recompute" and "old" not in config.snapshots:
        problem = "recompute needs a snapshot named old; add snapshots: {old: {decay: 0.0}}"
        yield ConfigConflict(("likelihood", "old"), problem)


def _mixtures_have_old(config: RunSections) -> Iterator[ConfigConflict]:
    likelihood = config.likelihood
    if likelihood.kind == "forward" and likelihood.mix is not None and likelihood.old != "recompute":
        yield ConfigConflict(("likelihood", "mix"), "mixtures need the old weights; set likelihood.old: recompute")
