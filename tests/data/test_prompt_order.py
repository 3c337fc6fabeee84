"""Tests of the order of prompts, which depends on seed and step only."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difrl.data.prompt_order import PromptOrder
from difrl.data.prompts import Prompt


def prompts(count: int, weights: list[float] | None = None) -> list[Prompt]:
    return [Prompt(str(i), {}, None, weights[i] if weights else 1.0) for i in range(count)]


@settings(max_examples=30)
@given(count=st.integers(1, 40), per_step=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_epochs_are_whole_and_steps_without_repeats(count: int, per_step: int, seed: int) -> None:
    order = PromptOrder(prompts(count), per_step, seed)
    steps = [order.step(n) for n in range(3 * count)]
    walked = [index for step in steps for index in step]
    # 3 * count steps are 3 * per_step epochs.
    for epoch in range(3 * per_step):
        assert sorted(walked[epoch * count : (epoch + 1) * count]) == list(range(count))
    if per_step <= count:
        assert all(len(set(step)) == per_step for step in steps)


def test_a_step_depends_on_seed_and_number_only() -> None:
    order = PromptOrder(prompts(30), 12, seed=1)
    forward = [order.step(n) for n in range(20)]
    assert [PromptOrder(prompts(30), 12, seed=1).step(n) for n in reversed(range(20))] == forward[::-1]
    assert [PromptOrder(prompts(30), 12, seed=2).step(n) for n in range(20)] != forward
    # The same on every machine and in every version: a run that is resumed elsewhere goes on with the same prompts.
    assert PromptOrder(prompts(5), 3, seed=0).step(0) == [1, 2, 0]


def test_epochs_differ() -> None:
    order = PromptOrder(prompts(12), 12, seed=0)
    assert order.step(0) != order.step(1)


def test_weights_set_how_often_a_prompt_is_drawn() -> None:
    weights = [1.0, 1.0, 2.0, 4.0]
    order = PromptOrder(prompts(4, weights), 2, seed=0)
    steps = [order.step(n) for n in range(4000)]
    assert all(len(set(step)) == 2 for step in steps)
    drawn = Counter(index for step in steps for index in step)
    for index, weight in enumerate(weights):
        share = 2 * weight / sum(weights)
        # Four standard errors of a Bernoulli share, or exactly 1.
        assert abs(drawn[index] / 4000 - share) <= 4 * math.sqrt(share * (1 - share) / 4000)


def test_a_share_above_one_is_certain_and_the_rest_is_shared() -> None:
    # 3 of 4 a step: the last would have a share of 3 * 6 / 9 = 2, so it is in every step; the others get 2/3 each.
    order = PromptOrder(prompts(4, [1.0, 1.0, 1.0, 6.0]), 3, seed=0)
    steps = [order.step(n) for n in range(3000)]
    assert all(len(set(step)) == 3 and 3 in step for step in steps)
    drawn = Counter(index for step in steps for index in step)
    assert all(abs(drawn[i] / 3000 - 2 / 3) < 4 * math.sqrt(2 / 9 / 3000) for i in range(3))


def test_a_step_larger_than_a_weighted_set_repeats_by_weight() -> None:
    order = PromptOrder(prompts(2, [1.0, 3.0]), 8, seed=0)
    assert all(Counter(order.step(n)) == {0: 2, 1: 6} for n in range(50))


@pytest.mark.parametrize(("count", "per_step"), [(0, 1), (1, 0)])
def test_nothing_to_order(count: int, per_step: int) -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        PromptOrder(prompts(count), per_step, seed=0)


@settings(max_examples=30)
@given(count=st.integers(1, 40), per_step=st.integers(1, 40), step=st.integers(0, 50))
def test_draws_of_a_step_go_through_the_other_prompts_first(count: int, per_step: int, step: int) -> None:
    order = PromptOrder(prompts(count), per_step, seed=3)
    own, draws = order.step(step), [order.redraw(step, draw) for draw in range(1, 10)]
    others = set(range(count)) - set(own)
    walked = [index for draw in draws for index in draw]
    assert set(walked[: len(others)]) <= others
    assert len(set(walked[:count])) == min(count, len(walked))
    if per_step <= count:
        assert all(len(set(draw)) == per_step for draw in draws)


def test_draws_differ_with_step_and_draw() -> None:
    for order in (PromptOrder(prompts(30), 4, 0), PromptOrder(prompts(30, [1.0 + i for i in range(30)]), 4, 0)):
        found = [tuple(order.redraw(step, draw)) for step in range(3) for draw in (1, 2)]
        assert len(set(found)) == 6
        assert order.redraw(1, 2) == order.redraw(1, 2)


def test_weights_set_how_often_a_prompt_is_drawn_again() -> None:
    order = PromptOrder(prompts(4, [1.0, 1.0, 2.0, 4.0]), 2, seed=0)
    drawn = Counter(index for step in range(2000) for draw in (1, 2) for index in order.redraw(step, draw))
    assert [drawn[i] / 4000 for i in range(4)] == pytest.approx([0.25, 0.25, 0.5, 1.0], abs=0.03)
