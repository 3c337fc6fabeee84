"""Conflicting settings of language models are refused when a recipe is read, with the key and the reason."""

from __future__ import annotations

from typing import Any

import pytest

from difrl.config import RunConfig
from difrl.config.checks.anchors import _OF_DISTRIBUTIONS
from difrl.core import F_DIVERGENCES
from tests.recipes import TEACHER, recipe, text_recipe

PAIRS = {"data": {"train": "pairs.jsonl", "rows": "pairs", "prompts_per_step": 4, "group_size": 2}}
OLD = {"snapshots": {"old": {"decay": 0.0}}}
RECOMPUTED = {"likelihood": {"kind": "tokens", "old": "recompute"}, **OLD}
DETACHED = {"likelihood": {"kind": "tokens", "old": "detach"}}
SILENT = [{"import": "tests.fakes:Ones", "weight": 0.0}]
ALONE = {"data": {"group_size": 1}}
PLAIN = {"advantage": {"baseline": "none", "std": "none"}}
DISTILLED = {"rewards": SILENT, **TEACHER, "anchors": [{"to": "teacher", "divergence": "k1", "place": "decision"}]}
CENTRED = {"kind": "centred", "decisions": "sum"}


def anchored(divergence: str, **more: Any) -> dict[str, Any]:
    return {"anchors": [{"to": "base", "divergence": divergence, **more}]}


def test_divergences_of_distributions_are_those_of_the_core() -> None:
    assert set(_OF_DISTRIBUTIONS) == set(F_DIVERGENCES)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"rollout": {"kernel": "cps"}}, "rollout.kernel: kernel is a setting of image models"),
        ({"eval": {"steps": 4}}, "eval.steps: steps is a setting of image models"),
        ({"model": {"attention": "xformers"}}, "model.attention: found xformers"),
        (anchored("velocity"), "anchors.0.divergence: a tokens likelihood has no velocity divergence"),
        (anchored("k3", guidance=2.0), "anchors.0.guidance: guidance is a setting of image models"),
        (anchored("k3", vocabulary="sampled"), "anchors.0.vocabulary: k3 is not a divergence of distributions"),
        (anchored("reverse_kl", alpha=0.3), "anchors.0.alpha: reverse_kl has no alpha"),
        (anchored("k1"), "the expected gradient of k1 as a loss is zero"),
        (anchored("k3", place="reward"), "only k1 in the reward"),
        ({**anchored("k1", place="decision"), "objective": CENTRED}, "anchors.0.place: decision gives every decision"),
        ({"anchors": [{"to": "teacher", "divergence": "k3"}]}, "'teacher' is not a snapshot"),
        ({"teachers": {"base": {"path": "tiny-lm"}}}, "teachers.base: the name base is used"),
        ({"objective": {"kind": "centred"}}, "token j of one text is not comparable"),
        ({"objective": {"kind": "preference"}}, "compared as a whole: token j of one text"),
        ({"objective": {"kind": "negative_aware"}}, "found likelihood.kind: tokens"),
        ({"objective": {"kind": "ratio_normalised"}}, "set bias: batch, or likelihood.old: recompute"),
        ({"objective": {"kind": "divergence_masked"}}, "the mask needs KL"),
        ({"objective": {"kind": "kl_cov"}}, "the sign of a rounding error"),
        ({"objective": {"kind": "kl_cov"}, **DETACHED}, "the penalty would have no effect"),
        ({"objective": CENTRED, "train": {"aggregation": "sample"}}, "train.aggregation: the objective takes the sum"),
        ({"generation": {"sleep": False}}, "generation.sleep: the trained network draws"),
        (
            {"generation": {"engine": "vllm"}, "objective": CENTRED},
            "do not apply to the sum over the tokens of a sample",
        ),
        ({**PAIRS, **DETACHED, "generation": {"engine": "vllm"}}, "no engine draws any"),
        (PAIRS, "likelihood.old: the texts of data.rows: pairs come from a file, which has no recorded ℓ"),
        ({**PAIRS, **DETACHED, **anchored("k3")}, "are not drawn from θ, as an estimate assumes"),
        ({**PAIRS, **DETACHED, **anchored("k1", place="reward")}, "so their k1 is not a KL"),
        ({**PAIRS, **DETACHED, **anchored("forward_kl", vocabulary="sampled")}, "anchors.0.vocabulary: the samples of"),
        (ALONE, "data.group_size: found 1, and advantages compare the samples of a prompt"),
        ({**ALONE, **PLAIN, "objective": CENTRED}, "found 1, and centred compares the samples"),
        (
            {**ALONE, **DISTILLED, "anchors": [{"to": "teacher", "divergence": "k1", "place": "reward"}]},
            "found 1, and adv",
        ),
        (
            {"collect": {"max_draws": 2, "by": "ones"}},
            r"collect.by: 'ones' is not a reward with a weight \(found Ones\)",
        ),
        ({**DISTILLED, "collect": {"by": "Ones"}}, r"'Ones' is not a reward with a weight \(found none\)"),
        ({"collect": {"by": "Ones"}}, "collect.by: groups are drawn once"),
        ({"rewards": SILENT}, "every anchor is at the initial θ"),
        ({"rewards": SILENT, **anchored("k1", place="decision")}, "every anchor is at the initial θ"),
    ],
)
def test_conflicting_settings_are_refused(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        text_recipe("nowhere", **sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"kind": "ratio_normalised"}, **RECOMPUTED},
        {"objective": {"kind": "divergence_masked"}, **RECOMPUTED},
        {"objective": {"kind": "kl_cov"}, **RECOMPUTED},
        {**PAIRS, **DETACHED, **anchored("reverse_kl")},
        {"rewards": SILENT, **TEACHER, "anchors": [{"to": "teacher", "divergence": "forward_kl"}]},
        DISTILLED,
        {**DISTILLED, **ALONE},
        {**PLAIN, **ALONE},
        {"collect": {"max_draws": 2, "by": "Ones"}},
        {**TEACHER, "anchors": [{"to": "base", "divergence": "k1", "place": "decision", "coefficient": -0.25}]},
    ],
)
def test_consistent_settings_are_accepted(sections: dict[str, Any]) -> None:
    assert isinstance(text_recipe("nowhere", **sections), RunConfig)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"generation": {"temperature": 0.7}}, "generation.temperature: temperature is a setting of language models"),
        ({"eval": {"temperature": 0.0}}, "eval.temperature: temperature is a setting of language models"),
        (TEACHER, "teachers.teacher: teacher is a setting of language models"),
        (anchored("forward_kl"), "a forward likelihood has no forward_kl divergence"),
        (anchored("velocity", alpha=0.3), "anchors.0.alpha: velocity has no alpha"),
        (anchored("velocity", coefficient=-1.0), "anchors.0.coefficient: found -1"),
    ],
)
def test_settings_of_texts_are_refused_for_images(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        recipe("nowhere", **sections)
