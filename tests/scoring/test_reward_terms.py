"""Tests of terms of the weighted sum by hand: members, shapes and combinations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from difrl.config import RewardConfig
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.scoring import Scorer
from difrl.scoring.reward_terms import RewardTerm, build_shape, build_term
from rewards import RewardError, Scores
from tests.fakes import Brightness

GROUPS = torch.tensor([0, 0, 1])
LOG3 = math.log(3.0)


def scores(*values: float | None) -> Scores:
    found = torch.tensor([math.nan if v is None else v for v in values])
    return Scores(torch.where(found.isnan(), 0.0, found), ~found.isnan())


def table(*rows: list[float | None]) -> Scores:
    parts = [scores(*row) for row in rows]
    return Scores(torch.stack([p.values for p in parts]), torch.stack([p.valid for p in parts]))


def listed(found: Scores) -> list[float | None]:
    return [v if ok else None for v, ok in zip(found.values.tolist(), found.valid.tolist(), strict=True)]


def term(**settings: Any) -> RewardTerm:
    return build_term(RewardConfig.model_validate(settings), lambda config: Brightness())


def summed(
    one: RewardTerm, found: Mapping[str, Scores], references: Mapping[str, Scores] | None = None
) -> dict[str, Any]:
    return {name: listed(s) for name, s in one.shaped_scores(found, GROUPS, references or {}).items()}


def test_a_plain_reward_is_the_only_member_of_its_term() -> None:
    one = term(name="a")
    found = {"a": scores(1.0, None, 3.0)}
    assert listed(one.raw_scores(found)) == [1.0, None, 3.0]
    assert summed(one, found) == {"a": [1.0, None, 3.0]}
    assert (one.has_shape, one.compares) == (False, False)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"kind": "clip", "low": 0.5}, [0.5, 1.0, 2.0]),
        ({"kind": "clip", "high": 0.5}, [0.0, 0.5, 0.5]),
        ({"kind": "min_max", "low": -2.0, "high": 2.0}, [0.5, 0.75, 1.0]),
        ({"kind": "min_max"}, [0.0, 1.0, 0.0]),
        ({"kind": "par"}, [0.5, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-(2 - LOG3)))]),
        (
            {"kind": "log_sigmoid", "quantile": None},
            [-math.log(2), -math.log(1 + math.exp(-1)), -math.log(1 + 3 * math.exp(-2))],
        ),
    ],
)
def test_shapes_of_a_plain_reward(shape: dict[str, Any], expected: list[float]) -> None:
    one = term(name="a", shape=shape)
    references = {"a": table([0.0], [0.0], [LOG3])}
    found = {"a": scores(0.0, 1.0, 2.0)}
    assert listed(one.raw_scores(found)) == [0.0, 1.0, 2.0]
    assert summed(one, found, references) == {"a": pytest.approx(expected, rel=1e-6)}


def test_noise_is_corrected() -> None:
    one = term(name="a", shape={"kind": "noise", "false_positive": 0.1, "false_negative": 0.4})
    assert summed(one, {"a": scores(0.0, 1.0, None)}) == {"a": pytest.approx([-0.2, 1.8, None])}
    with pytest.raises(
        RewardError, match=r"reward 'a' failed: cannot be shaped: a verifier returns 0 or 1, found 0\.5"
    ):
        summed(one, {"a": scores(0.5, 1.0, 1.0)})


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ({"combine": "mean"}, [2.0, 2.0, None]),
        ({"combine": "worst"}, [1.0, 2.0, None]),
        ({"combine": "uncertainty", "penalty": 0.5}, [1.5, 2.0, None]),
    ],
)
def test_ensembles(combine: dict[str, Any], expected: list[float | None]) -> None:
    one = term(ensemble=[{"name": "a"}, {"name": "b"}], label="both", **combine)
    found = {"both/a": scores(1.0, 2.0, 5.0), "both/b": scores(3.0, 2.0, None)}
    assert listed(one.raw_scores(found)) == expected
    assert summed(one, found) == {"both": expected}


def test_shapes_of_members_come_before_the_ensemble_and_its_own_after() -> None:
    """Members 4 and 1 are clipped to 2 and 1. Their mean 1.5 is scaled by the range 1 to 2. Metrics have the raw mean 2.5."""
    clipped = {"name": "a", "shape": {"kind": "clip", "high": 2.0}}
    one = term(ensemble=[clipped, {"name": "b"}], label="both", shape={"kind": "min_max", "low": 1.0, "high": 2.0})
    found = {"both/a": scores(4.0, 0.0, 2.0), "both/b": scores(1.0, 4.0, 2.0)}
    assert listed(one.raw_scores(found)) == [2.5, 2.0, 2.0]
    assert summed(one, found) == {"both/a": [2.0, 0.0, 2.0], "both": [0.5, 1.0, 1.0]}


def test_an_ensemble_is_compared_with_its_scores_of_the_references() -> None:
    """One member has references 0 and 2, clipped to 1, the other 1 and 3. The worst are those of (0, 1) and of (1, 3)."""
    clipped = {"name": "a", "shape": {"kind": "clip", "high": 1.0}}
    one = term(ensemble=[clipped, {"name": "b"}], combine="worst", label="both", shape={"kind": "par"})
    found = {"both/a": scores(1.0, 5.0, 0.0), "both/b": scores(1.0, 5.0, None)}
    references = {
        "both/a": table([0.0, 2.0], [0.0, None], [0.0, 0.0]),
        "both/b": table([1.0, 3.0], [1.0, 1.0], [0.0, 0.0]),
    }
    expected = (1 / (1 + math.exp(-1)) + 0.5) / 2, 1 / (1 + math.exp(-1))
    *known, unscored = summed(one, found, references)["both"]
    assert known == pytest.approx(expected, rel=1e-6)
    assert unscored is None


def test_references_are_compared_among_themselves_where_shapes_follow_each_other() -> None:
    """A member's references 0 and log 3 become the preferences (1/2 + 1/4) / 2 and (3/4 + 1/2) / 2. A third is invalid."""
    preferred = {"name": "a", "shape": {"kind": "par"}}
    last = {"kind": "log_sigmoid", "quantile": 1.0}
    one = term(ensemble=[preferred, preferred | {"label": "b"}], label="both", shape=last)
    found = {name: scores(LOG3, 0.0, 0.0) for name in ("both/a", "both/b")}
    references = {name: table(*[[0.0, LOG3, None]] * 3) for name in found}
    low, high = 3 / 8, 5 / 8
    expected = [-math.log(1 + math.exp(high - own)) for own in (high, low, low)]
    made = summed(one, found, references)
    assert made["both/a"] == pytest.approx([high, low, low], rel=1e-6)
    assert made["both"] == pytest.approx(expected, rel=1e-6)


def test_a_shape_without_references_is_an_error() -> None:
    with pytest.raises(RewardError, match=r"reward 'a' failed: cannot be shaped: .*set references: \{count: 5\}"):
        summed(term(name="a", shape={"kind": "par"}), {"a": scores(1.0, 1.0, 1.0)})
    one = term(ensemble=[{"name": "a"}, {"name": "b"}], label="both", shape={"kind": "par"})
    found = {name: scores(1.0, 1.0, 1.0) for name in ("both/a", "both/b")}
    with pytest.raises(RewardError, match="there are none"):  # of one member is not of the ensemble
        summed(one, found, {"both/a": table([0.0], [0.0], [0.0])})
    assert build_shape(None) is None


PROMPTS = tuple(Prompt(text, {}) for text in ("one", "two", "three"))
IMAGES = torch.tensor([0.25, 0.5, 0.75])[:, None, None, None].expand(3, 3, 2, 2)
ROLLOUT = Rollout(PROMPTS, GROUPS, torch.arange(3), {}, IMAGES)
PLAIN = {"import": "tests.fakes:Brightness"}


def brightness(label: str, factor: float, **more: Any) -> dict[str, Any]:
    return {**PLAIN, "label": label, "options": {"factor": factor}, **more}


def scorer(*optimised: dict[str, Any], watched: tuple[dict[str, Any], ...] = ()) -> Scorer:
    found = [[RewardConfig.model_validate(one) for one in some] for some in (optimised, watched)]
    return Scorer.build(*found, torch.device("cpu"))


def said(scored: ScoredRollout) -> dict[str, list[float]]:
    """Return the scores of rewards and shapes for every sample."""
    return {name: part.tolist() for name, part in scored.parts.items() if not name.startswith("invalid/")}


def test_training_sums_shaped_rewards_by_the_weights_of_the_step_and_evaluation_raw_ones() -> None:
    clipped = brightness("clipped", 1.0, shape={"kind": "clip", "high": 0.5}, weight=2.0)
    falling = brightness("falling", 4.0, weight={"kind": "linear", "start": 1.0, "end": 0.5})
    found = scorer(clipped, falling)
    trained = found.score_for_training(ROLLOUT, {"falling": 1.0})
    assert trained.rewards.tolist() == [2 * 0.25 + 1.0, 2 * 0.5 + 2.0, 2 * 0.5 + 3.0]
    assert said(trained) == {
        "reward/clipped": [0.25, 0.5, 0.75],
        "reward/falling": [1.0, 2.0, 3.0],
        "shaped/clipped": [0.25, 0.5, 0.5],
    }
    evaluated = found(ROLLOUT)
    assert evaluated.rewards.tolist() == [2 * 0.25 + 0.5, 2 * 0.5 + 1.0, 2 * 0.75 + 1.5]
    assert list(said(evaluated)) == ["reward/clipped", "reward/falling"]


def test_members_are_reported_beside_their_ensemble() -> None:
    members = {"ensemble": [brightness("a", 1.0), brightness("b", 3.0)], "combine": "worst"}
    found = scorer(brightness("c", 1.0), watched=({**members, "label": "jury"},)).score_for_training(ROLLOUT, {})
    assert [name for name in found.parts if name.startswith("invalid/")] == [
        "invalid/c",
        "invalid/jury/a",
        "invalid/jury/b",
    ]
    assert said(found) == {
        "reward/c": [0.25, 0.5, 0.75],
        "watch/jury": [0.25, 0.5, 0.75],
        "watch/jury/a": [0.25, 0.5, 0.75],
        "watch/jury/b": [0.75, 1.5, 2.25],
    }


def test_a_weight_that_has_come_to_0_leaves_rows_valid() -> None:
    fading = brightness("fading", 1.0, weight={"kind": "linear", "start": 1.0, "end": 0.0})
    found = scorer(brightness("plain", 1.0), fading)
    dark = RewardTerm.from_reward("fading", Brightness(fails=lambda images: images.mean((1, 2, 3)) < 0.3))
    found = Scorer({**found.optimised, "fading": (dark, 0.0)}, {})
    assert found.score_for_training(ROLLOUT, {"fading": 1.0}).valid.tolist() == [False, True, True]
    assert found.score_for_training(ROLLOUT, {"fading": 0.0}).valid.all()


def test_a_row_has_no_references_where_none_of_them_could_be_scored() -> None:
    references = {"a": table([0.25, None], [None, None], [0.75, 0.75])}
    found = scorer(brightness("a", 1.0, shape={"kind": "par"})).score_for_training(ROLLOUT, {}, references)
    assert found.parts["references/invalid/a"].tolist() == [0.0, 1.0, 0.0]
    assert found.valid.tolist() == [True, False, True]
    assert found.rewards.tolist() == [0.5, 0.0, 0.5]


def test_members_that_are_compared_are_those_of_terms_that_compare() -> None:
    preferred = {"ensemble": [brightness("a", 1.0), brightness("b", 3.0)], "label": "jury", "shape": {"kind": "par"}}
    assert list(scorer(preferred, brightness("c", 1.0)).reference_rewards) == ["jury/a", "jury/b"]


@pytest.mark.parametrize(
    "settings",
    [
        brightness("c", 1.0),
        brightness("c", 1.0, shape={"kind": "clip", "low": 0.0}),
        {"ensemble": [brightness("a", 1.0), brightness("b", 1.0)], "label": "c"},
        {"ensemble": [brightness("a", 1.0, shape={"kind": "clip", "low": 0.0}), brightness("b", 1.0)], "label": "c"},
    ],
)
def test_the_scorer_sums_the_shaped_scores_of_a_recipe(settings: dict[str, Any]) -> None:
    trained = scorer(settings).score_for_training(ROLLOUT, {})
    column = RewardConfig.model_validate(settings).column
    assert trained.parts[column].tolist() == trained.rewards.tolist()
    assert (column == "shaped/c") == ("shaped/c" in trained.parts)
