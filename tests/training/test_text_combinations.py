"""A tokens likelihood with every objective: a recipe that makes sense trains a language model, any other is refused when read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from difrl.config import RunConfig
from difrl.data.prompts import Prompt
from difrl.policies.load import load_policy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.trainer import Trainer
from tests.graded_texts import Graded
from tests.recipes import text_recipe
from tests.training.test_combinations import OBJECTIVES

PROMPTS = [Prompt(text, {}) for text in ("1+", "2+5", "7=", "4+4=")]
BOTH: tuple[str, ...] = ("recorded", "recompute")
WHOLE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(OBJECTIVES, BOTH),
    # These read the whole distributions of old, or a slope that a recorded ℓ_old would give at random.
    "ratio_normalised": ("recompute",),
    "divergence_masked": ("recompute",),
    "kl_cov": ("recompute",),
    "negative_aware": (),
}
OF_TEXTS = ("centred", "centred, raw", "preference", "preference, ipo", "anchored_preference")
"""They compare samples decision by decision, and tokens of two texts have nothing to do with each other."""
TOGETHER: dict[str, dict[str, tuple[str, ...]]] = {
    "each": {**WHOLE, **dict.fromkeys(OF_TEXTS, ())},
    "mean": WHOLE,
    "sum": WHOLE,
}
"""decisions → objective → the old likelihoods it makes sense with."""


def sections(old: str, objective: str, decisions: str) -> dict[str, Any]:
    of_decisions = {} if objective == "negative_aware" else {"decisions": decisions}
    return {
        "likelihood": {"kind": "tokens", "old": old},
        "objective": {**OBJECTIVES[objective], **of_decisions},
        "snapshots": {"old": {"decay": 0.0}, "ema": {"decay": 0.5}},
        "anchors": [{"to": "old", "divergence": "reverse_kl", "coefficient": 0.1}],
        "advantage": {"std": "none" if objective == "centred, raw" else "group"},
        "data": {"prompts_per_step": 2, "group_size": 4},
    }


COMBINATIONS = [
    (old, objective, decisions)
    for decisions, objectives in TOGETHER.items()
    for objective in objectives
    for old in BOTH
    if decisions == "each" or objective != "negative_aware"
]


def fits(old: str, objective: str, decisions: str) -> bool:
    return old in TOGETHER[decisions][objective]


FITTING = [c for c in COMBINATIONS if fits(*c)]
SEEN = list({objective: (old, objective, decisions) for old, objective, decisions in reversed(FITTING)}.values())
"""Of every objective the first."""


@pytest.mark.parametrize(("old", "objective", "decisions"), COMBINATIONS)
def test_a_combination_is_read_or_refused(old: str, objective: str, decisions: str) -> None:
    parts = sections(old, objective, decisions)
    if fits(old, objective, decisions):
        assert isinstance(text_recipe("nowhere", **parts), RunConfig)
        return
    with pytest.raises(ValidationError, match=r"(objective\.(kind|bias|decisions)|likelihood\.old): "):
        text_recipe("nowhere", **parts)


def trains(path: Path, old: str, objective: str, decisions: str) -> None:
    """Two steps of one update each, in micro-batches that split groups, leave finite numbers and move the weights."""
    config = text_recipe(path, **sections(old, objective, decisions), train={"micro_batch": 15, "lr": 1e-3})
    trainer = Trainer(
        config, load_policy(config), Scorer.from_rewards({"graded": (Graded(), 1.0)}, {}), PROMPTS, DistributedContext()
    )
    before = [p.detach().clone() for p in trainer.parameters]
    rows = [trainer.step(0), trainer.step(1)]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[1]["kl/old"] == pytest.approx(0.0, abs=1e-6)  # the snapshot was taken after the step before
    assert any((p != first).any() for p, first in zip(trainer.parameters, before, strict=True))


@pytest.mark.parametrize(("old", "objective", "decisions"), SEEN)
def test_every_objective_trains(lm: Path, old: str, objective: str, decisions: str) -> None:
    trains(lm, old, objective, decisions)


@pytest.mark.slow
@pytest.mark.parametrize(("old", "objective", "decisions"), [c for c in FITTING if c not in SEEN])
def test_every_combination_that_is_read_trains(lm: Path, old: str, objective: str, decisions: str) -> None:
    trains(lm, old, objective, decisions)


@pytest.mark.parametrize(
    ("parts", "path", "reason"),
    [
        (("recorded", "ratio_normalised", "each"), "objective.bias", "full old distribution.*set bias: batch"),
        (("recorded", "divergence_masked", "sum"), "likelihood.old", "only the ℓ of each token.*old: recompute"),
        (("recompute", "centred", "each"), "objective.decisions", "centred by decision.*set sum, or mean"),
        (("recompute", "preference", "each"), "objective.decisions", "compared as a whole.*set sum, or mean"),
        (("recorded", "anchored_preference", "each"), "objective.decisions", "compared as a whole.*set sum, or mean"),
        (("recompute", "negative_aware", "each"), "objective.kind", "mixtures of outputs.*kind: forward"),
        (("detach", "kl_cov", "each"), "likelihood.old", "log ρ zero.*old: recompute"),
        (("detach", "divergence_masked", "each"), "likelihood.old", "makes the KL from old zero"),
    ],
)
def test_a_refusal_names_the_key_and_the_reason(parts: tuple[str, str, str], path: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=rf"{path}: .*{reason}"):
        text_recipe("nowhere", **sections(*parts))
