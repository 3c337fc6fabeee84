"""Conflicts of anchors: divergences, coefficients, snapshots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import get_args

from difrl.config.checks.conflict import ConfigConflict
from difrl.config.schema.anchors import DistributionDivergence
from difrl.config.schema.base import KeyPath
from difrl.config.schema.run import RunSections
from difrl.config.schema.schedules import value_range


def check_anchors(config: RunSections) -> Iterator[ConfigConflict]:
    """Yield the conflicts of this part of a config."""
    yield from _estimators_use_policy_samples(config)
    yield from _anchor_settings_have_effect(config)
    yield from _values_are_in_range(config)
    yield from _divergences_exist(config)
    yield from _divergences_match_their_place(config)
    yield from _snapshots_exist(config)
    yield from _one_anchor_a_target(config)


def _estimators_use_policy_samples(config: RunSections) -> Iterator[ConfigConflict]:
    rows = config.data.rows
    if rows == "prompts":
        return
    for index, anchor in enumerate(config.anchors):
        if anchor.samples != "own" or config.likelihood.kind == "forward":
            continue
        drawn = f"the samples of data.rows: {rows} are not drawn from θ"
        if anchor.place != "loss":
            yield ConfigConflict(
                ("anchors", index, "place"), f"{drawn}, so their k1 is not a KL; set loss and a full divergence"
            )
        elif anchor.divergence in ("k2", "k3") or anchor.vocabulary == "sampled":
            key = "vocabulary" if anchor.vocabulary == "sampled" else "divergence"
            yield ConfigConflict(
                ("anchors", index, key), f"{drawn}, as an estimate assumes; set e.g. reverse_kl with vocabulary: full"
            )


def _anchor_settings_have_effect(config: RunSections) -> Iterator[ConfigConflict]:
    for index, anchor in enumerate(config.anchors):
        if anchor.alpha != 0.5 and anchor.divergence != "alpha":
            problem = f"{anchor.divergence} has no alpha; set divergence: alpha, or remove it"
            yield ConfigConflict(("anchors", index, "alpha"), problem)
        if anchor.vocabulary != "full" and anchor.divergence not in _OF_DISTRIBUTIONS:
            problem = f"{anchor.divergence} is not a divergence of distributions over a vocabulary; remove vocabulary"
            yield ConfigConflict(("anchors", index, "vocabulary"), problem)


def _values_are_in_range(config: RunSections) -> Iterator[ConfigConflict]:
    ranged: list[tuple[KeyPath, tuple[float, ...], float]] = [
        (("train", "lr"), value_range(config.train.lr), math.inf),
        *(
            (("anchors", i, "coefficient"), value_range(a.coefficient), math.inf)
            for i, a in enumerate(config.anchors)
            if a.place != "decision"  # where a negative one extrapolates beyond another anchor (2602.12125)
        ),
        *((("snapshots", name, "decay"), s.value_range, 1.0) for name, s in config.snapshots.items()),
    ]
    for path, levels, highest in ranged:
        for level in levels:
            if not 0 <= level <= highest:
                expected = "0 or more" if highest == math.inf else f"a number from 0 to {highest:g}"
                yield ConfigConflict(path, f"found {level:g}, expected {expected}")


_OF_DISTRIBUTIONS: tuple[str, ...] = get_args(DistributionDivergence)
_DIVERGENCES: Mapping[str, tuple[str, ...]] = {
    "forward": ("velocity", "weighted"),
    "reverse": ("gaussian", "velocity", "k1", "k2", "k3"),
    "tokens": ("k1", "k2", "k3", *_OF_DISTRIBUTIONS),
}
"""Likelihood -> its divergences. Messages recommend the first."""


def _divergences_exist(config: RunSections) -> Iterator[ConfigConflict]:
    kind = config.likelihood.kind
    for index, anchor in enumerate(config.anchors):
        if kind == "forward" and anchor.place != "loss":
            problem = (
                "a forward likelihood is a surrogate at random times, not the log-probability of a sample, so it cannot "
                "be subtracted from the reward; set place: loss and divergence: velocity, or likelihood.kind: reverse"
            )
            yield ConfigConflict(("anchors", index, "place"), problem)
        elif anchor.divergence not in (known := _DIVERGENCES[kind]):
            problem = f"a {kind} likelihood has no {anchor.divergence} divergence; set divergence: {' or '.join(known)}"
            yield ConfigConflict(("anchors", index, "divergence"), problem)


def _divergences_match_their_place(config: RunSections) -> Iterator[ConfigConflict]:
    if config.likelihood.kind == "forward":
        return
    for index, anchor in enumerate(config.anchors):
        if anchor.place == "loss" and anchor.divergence == "k1":
            exact = "gaussian" if config.likelihood.kind == "reverse" else "reverse_kl"
            problem = (
                "the expected gradient of k1 as a loss is zero, so it has no effect; set place: reward, or k2 (the gradient of "
                f"KL(θ‖anchor)), k3 (of KL(anchor‖θ)) or {exact}"
            )
            yield ConfigConflict(("anchors", index, "divergence"), problem)
        elif anchor.place != "loss" and anchor.divergence != "k1":
            problem = (
                f"found {anchor.divergence}, and only k1 in the reward has the gradient of KL(θ‖anchor); for any other the "
                "reward would miss the gradient of its own value; set divergence: k1, or place: loss"
            )
            yield ConfigConflict(("anchors", index, "divergence"), problem)


def _snapshots_exist(config: RunSections) -> Iterator[ConfigConflict]:
    known = list(dict.fromkeys(["base", *config.snapshots]))
    uses: list[tuple[KeyPath, str, list[str]]] = [
        (("rollout", "snapshot"), config.rollout.snapshot, ["current", *known]),
        (("eval", "snapshot"), config.eval.snapshot, ["current", *config.snapshots]),
        *((("anchors", i, "to"), anchor.to, [*known, *config.teachers]) for i, anchor in enumerate(config.anchors)),
    ]
    if config.likelihood.kind == "forward" and config.likelihood.noise.kind == "inversion":
        uses.append((("likelihood", "noise", "snapshot"), config.likelihood.noise.snapshot, ["current", *known]))
    for path, name, expected in uses:
        if name not in expected:
            problem = f"{name!r} is not a snapshot; expected {' or '.join(expected)}, or declare it in snapshots"
            yield ConfigConflict(path, problem)
    for name in ("base", "current"):
        if name in config.snapshots:
            yield ConfigConflict(("snapshots", name), f"the name {name} is reserved; choose another, such as ema")


def _one_anchor_a_target(config: RunSections) -> Iterator[ConfigConflict]:
    targets = [anchor.label for anchor in config.anchors]
    for index, target in enumerate(targets):
        if target in targets[:index]:
            problem = f"a second anchor to {config.anchors[index].to!r} under the same guidance; remove one"
            yield ConfigConflict(("anchors", index, "to"), problem)
