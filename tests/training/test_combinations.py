"""Every likelihood with every objective: a recipe that makes sense trains a real pipeline, any other is refused when read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from difrl.config import RunConfig
from tests.recipes import recipe
from tests.training.test_trainer_sd3 import sd3_trainer

Sections = dict[str, Any]

KERNEL = {"steps": 3, "kernel": "flow_sde", "noise_level": 0.7}
FORWARD = {"kind": "forward", "decisions": 2, "old": "recompute"}
LIKELIHOODS: dict[str, Sections] = {
    "reverse": {"likelihood": {"kind": "reverse"}, "rollout": KERNEL},
    "reverse, recomputed": {"likelihood": {"kind": "reverse", "old": "recompute"}, "rollout": KERNEL},
    "reverse, weighed": {"likelihood": {"kind": "reverse", "step_weight": "slope"}, "rollout": KERNEL},
    "forward": {"likelihood": FORWARD, "rollout": {"steps": 3}},
    "forward, detached": {"likelihood": {**FORWARD, "old": "detach"}, "rollout": {"steps": 3}},
    "forward, shared": {"likelihood": {**FORWARD, "share": ["t", "noise"]}, "rollout": {"steps": 3}},
    "forward, mixed": {"likelihood": {**FORWARD, "mix": 0.7, "error": "clean"}, "rollout": {"steps": 3}},
}
OBJECTIVES: dict[str, Sections] = {
    "clipped": {"kind": "clipped", "clip_low": 0.1, "clip_high": 0.2},
    "ratio_normalised": {"kind": "ratio_normalised"},
    "ratio_normalised, batch": {"kind": "ratio_normalised", "bias": "batch"},
    "clip_cov": {"kind": "clip_cov"},
    "kl_cov": {"kind": "kl_cov"},
    "divergence_masked": {"kind": "divergence_masked"},
    "centred": {"kind": "centred"},
    "centred, raw": {"kind": "centred", "reward": "raw", "temperature": 0.5, "form": "bce"},
    "negative_aware": {"kind": "negative_aware"},
    "preference": {"kind": "preference", "flip": 0.1},
    "preference, ipo": {"kind": "preference", "loss": "squared", "reference": "ema", "divergence": "alpha"},
    "anchored_preference": {"kind": "anchored_preference"},
}
REVERSE = [name for name in LIKELIHOODS if name.startswith("reverse")]
PLAIN = [*REVERSE, "forward", "forward, detached", "forward, shared"]
TOGETHER: dict[str, dict[str, list[str]]] = {
    "each": {
        "clipped": PLAIN,
        "ratio_normalised": REVERSE,
        "ratio_normalised, batch": PLAIN,
        "clip_cov": [],
        "kl_cov": [],
        "divergence_masked": REVERSE,
        "centred": PLAIN,
        "centred, raw": PLAIN,
        "negative_aware": ["forward, mixed"],
        "preference": [*REVERSE, "forward, shared"],
        "preference, ipo": [*REVERSE, "forward, shared"],
        "anchored_preference": [*REVERSE, "forward, shared"],
    },
    "mean": {
        name: [likelihood for likelihood in PLAIN if likelihood != "reverse, weighed"]
        for name in OBJECTIVES
        if name not in ("ratio_normalised", "ratio_normalised, batch", "divergence_masked", "negative_aware")
    }
    | {
        "clip_cov": [],
        "kl_cov": [],
        "ratio_normalised": [],
        "ratio_normalised, batch": ["forward", "forward, detached", "forward, shared"],
        "divergence_masked": ["reverse", "reverse, recomputed"],
    },
}
TOGETHER["sum"] = TOGETHER["mean"]
"""decisions → objective → the likelihoods it makes sense with."""


def sections(likelihood: str, objective: str, decisions: str) -> Sections:
    of_decisions = {} if objective == "negative_aware" else {"decisions": decisions}
    return {
        **LIKELIHOODS[likelihood],
        "objective": {**OBJECTIVES[objective], **of_decisions},
        "snapshots": {"old": {"decay": 0.0}, "ema": {"decay": 0.5}},
        "anchors": [{"to": "old", "coefficient": 0.1}],
        "advantage": {"std": "none" if objective == "centred, raw" else "group"},
        "data": {"prompts_per_step": 2, "group_size": 2},
    }


COMBINATIONS = [
    (likelihood, objective, decisions)
    for decisions, objectives in TOGETHER.items()
    for objective in objectives
    for likelihood in LIKELIHOODS
]


def fits(likelihood: str, objective: str, decisions: str) -> bool:
    return likelihood in TOGETHER[decisions][objective]


@pytest.mark.parametrize(("likelihood", "objective", "decisions"), COMBINATIONS)
def test_a_combination_is_read_or_refused(likelihood: str, objective: str, decisions: str) -> None:
    parts = sections(likelihood, objective, decisions)
    if fits(likelihood, objective, decisions):
        assert isinstance(recipe("nowhere", **parts), RunConfig)
        return
    with pytest.raises(ValidationError) as refusal:
        recipe("nowhere", **parts)
    assert "objective" in str(refusal.value) or "likelihood" in str(refusal.value)


def trains(path: Path, likelihood: str, objective: str, decisions: str) -> None:
    """Two steps of one update each, in micro-batches that split groups, leave finite numbers and move the weights."""
    trainer = sd3_trainer(path, **sections(likelihood, objective, decisions), train={"micro_batch": 3, "lr": 1e-3})
    before = [p.detach().clone() for p in trainer.parameters]
    rows = [trainer.step(0), trainer.step(1)]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[1]["kl/old"] == pytest.approx(0.0, abs=1e-6)  # the snapshot was taken after the step before
    assert any((p != old).any() for p, old in zip(trainer.parameters, before, strict=True))


SEEN = [
    ("reverse", "ratio_normalised", "each"),
    ("forward, mixed", "negative_aware", "each"),
    ("forward, shared", "preference", "each"),
]


@pytest.mark.parametrize(("likelihood", "objective", "decisions"), SEEN)
def test_some_of_every_shape_train(sd3: Path, likelihood: str, objective: str, decisions: str) -> None:
    trains(sd3, likelihood, objective, decisions)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("likelihood", "objective", "decisions"), [c for c in COMBINATIONS if fits(*c) and c not in SEEN]
)
def test_every_combination_that_is_read_trains(sd3: Path, likelihood: str, objective: str, decisions: str) -> None:
    trains(sd3, likelihood, objective, decisions)


@pytest.mark.parametrize(
    ("parts", "path", "reason"),
    [
        (("forward", "ratio_normalised", "each"), "objective.bias", "no closed form.*set bias: batch"),
        (("reverse", "ratio_normalised", "mean"), "objective.decisions", "its own scale.*set decisions: each"),
        (("forward", "divergence_masked", "each"), "objective.kind", "exact KL from old.*kind: reverse"),
        (("reverse", "clip_cov", "each"), "objective.kind", "entropy cannot fall; set clipped"),
        (("forward", "kl_cov", "sum"), "objective.kind", "entropy cannot fall; set clipped"),
        (("reverse", "negative_aware", "each"), "objective.kind", "mixtures of outputs.*kind: forward"),
        (("forward", "negative_aware", "each"), "likelihood.mix", "needs the mixtures.*mix: 1.0"),
        (("forward, mixed", "clipped", "each"), "likelihood.mix", "clipped does not use mixtures"),
        (("forward", "preference", "each"), "likelihood.share", "must share its draws.*or objective.decisions: mean"),
        (("reverse, weighed", "clipped", "sum"), "likelihood.step_weight", "no meaning for the sum"),
    ],
)
def test_a_refusal_names_the_key_and_the_reason(parts: tuple[str, str, str], path: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=rf"{path}: .*{reason}"):
        recipe("nowhere", **sections(*parts))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"advantage": {"std": "group"}}, r"advantage\.std: .* std: group changes; set std: none"),
        ({"advantage": {"std": "none", "clip": 5.0}}, r"advantage\.clip: .* set clip: null"),
        (
            {"advantage": {"std": "none", "baseline": "leave_one_out"}},
            r"advantage\.baseline: .* set baseline: none",
        ),
        (
            {"likelihood": {**FORWARD, "weighting": "elbo"}, "objective": {"kind": "centred", "decisions": "sum"}},
            r"objective\.decisions: .* counts it 2 times; set decisions: mean",
        ),
        (
            {"objective": {"kind": "preference", "decisions": "mean", "reference": "teacher"}},
            r"objective\.reference: 'teacher' is not a snapshot; expected base or old or ema",
        ),
        (
            {
                "likelihood": {**FORWARD, "old": "detach"},
                "objective": {"kind": "anchored_preference", "decisions": "mean", "reference": "old"},
            },
            r"objective\.reference: detach makes old the policy itself",
        ),
    ],
)
def test_what_a_section_asks_of_others(changed: Sections, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        recipe("nowhere", **{**sections("forward", "centred, raw", "mean"), **changed})


def test_a_mask_of_no_divergence_is_refused() -> None:
    parts = sections("reverse", "divergence_masked", "each")
    with pytest.raises(ValidationError, match=r"likelihood\.old: detach makes the KL from old zero"):
        recipe("nowhere", **{**parts, "likelihood": {"kind": "reverse", "old": "detach"}})


@pytest.mark.parametrize(
    ("likelihood", "objective", "advantage", "path"),
    [
        ("forward", {"kind": "centred", "reward": "raw"}, {"std": "none", "negative": 0.5}, "advantage.negative"),
        ("forward, shared", {"kind": "preference"}, {"positive": 0.0}, "advantage.positive"),
    ],
)
def test_factors_that_change_what_advantages_mean_are_refused(
    likelihood: str, objective: dict[str, Any], advantage: dict[str, Any], path: str
) -> None:
    parts = {**sections(likelihood, "clipped", "each"), "objective": objective}
    recipe("nowhere", **{**parts, "advantage": {"std": "none"}})
    with pytest.raises(ValidationError, match=path):
        recipe("nowhere", **{**parts, "advantage": advantage})


def test_pairs_compared_with_the_base_may_be_learnt_from_in_several_updates() -> None:
    """Their loss reads no old likelihood, so none has to be kept."""
    parts = {**sections("forward, shared", "preference", "each"), "train": {"updates_per_step": 2}}
    parts["likelihood"] = {**parts["likelihood"], "old": "detach"}
    assert recipe("nowhere", **parts).likelihood.old == "detach"
