"""Conflicts of objectives with the other parts of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from difrl.config.checks.conflict import ConfigConflict
from difrl.config.schema.run import RunSections


def check_objectives(config: RunSections) -> Iterator[ConfigConflict]:
    """Yield the settings that the objective cannot work with: those that its section declares, and those of all objectives."""
    for path, problem in config.objective.conflicts(config.likelihood, config.advantage):
        yield ConfigConflict(path, problem)
    yield from _reference_exists(config)
    yield from _mixtures_are_read(config)
    yield from _step_weights_have_single_decisions(config)
    yield from _bound_is_counted_once(config)


def _reference_exists(config: RunSections) -> Iterator[ConfigConflict]:
    name, known = config.objective.measured_from, list(dict.fromkeys(["base", "old", *config.snapshots]))
    if name not in known:
        problem = f"{name!r} is not a snapshot; expected {' or '.join(known)}, or declare it in snapshots"
        yield ConfigConflict(("objective", "reference"), problem)


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
