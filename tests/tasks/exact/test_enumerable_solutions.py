"""The fixed points of the enumerable task: by hand, as maxima, and as zeros of updates built from the core's functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime

from difrl.core import f_divergence
from difrl.tasks.exact import enumerable_solutions as answers
from difrl.tasks.exact import enumerable_updates as updates
from difrl.tasks.exact.enumerable import NODES, EnumerableTask
from difrl.tasks.exact.enumerable_solutions import (
    Array,
    completion_probabilities,
    exponential_tilt,
    kl,
    solve_token_wise,
)
from difrl.tasks.exact.enumerable_updates import Surrogate

TASK = EnumerableTask(seed=0)
BASE, REWARD, BETA = TASK.logits[0], TASK.rewards[0], 1.0
REFERENCE = completion_probabilities(BASE)
OPTIMUM = exponential_tilt(REFERENCE, REWARD, BETA)
INSIDE = ["reverse_kl", "forward_kl", "jensen_shannon", "alpha", "hellinger"]
"""Divergences whose f' is -inf at 0, so that every letter keeps some probability."""


def table(probabilities: Array) -> Array:
    """Return the logits [NODES, 4] of a distribution."""
    return np.concatenate([np.log(level).reshape(-1, 4) for level in answers.conditionals(probabilities)])


def test_a_tree_of_two_letters_by_hand() -> None:
    """ref uniform, r = log 2 for "ab" alone, beta 1: Z = 5/4, and token-wise Q(a) = 2/3 log 2 after Q's soft tilt."""
    reference, reward = np.full((2, 2), 0.25), np.array([[0.0, math.log(2)], [0.0, 0.0]])
    np.testing.assert_allclose(exponential_tilt(reference, reward, 1.0), [[0.2, 0.4], [0.2, 0.2]], rtol=1e-12)
    first = 2 ** (2 / 3) / (1 + 2 ** (2 / 3))
    expected = [[first / 3, 2 * first / 3], [(1 - first) / 2, (1 - first) / 2]]
    np.testing.assert_allclose(solve_token_wise(reference, reward, 1.0), expected, rtol=1e-12)
    assert kl(reference, np.array([[0.5, 0.25], [0.125, 0.125]])) == pytest.approx(math.log(2) / 4)
    assert answers.std(np.array([[0.5, 0.0], [0.5, 0.0]]), np.array([[3.0, 9.0], [1.0, 9.0]])) == 1.0


def test_completion_probabilities_are_the_product_over_prefixes() -> None:
    found = completion_probabilities(BASE)
    rows = np.exp(BASE) / np.exp(BASE).sum(axis=1, keepdims=True)
    assert found[2, 1, 3] == pytest.approx(rows[0, 2] * rows[3, 1] * rows[4 * 3 + 1 + 1, 3], rel=1e-12)
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(completion_probabilities(table(found)), found, rtol=1e-12)


def test_the_optimum_maximises_reward_less_kl() -> None:
    """It exceeds 200 distributions around it and far from it, and its derivative along every logit is 0."""

    def value(logits: Array) -> float:
        found = completion_probabilities(logits.reshape(NODES, 4))
        return float((found * REWARD).sum() - BETA * kl(found, REFERENCE))

    here = table(OPTIMUM).ravel()
    assert np.abs(approx_fprime(here, value, 1e-6)).max() < 1e-6  # forward differences: the step times a curvature of 1
    generator = np.random.default_rng(0)
    others = [here + scale * generator.normal(size=here.shape) for scale in (0.05, 1.0) for _ in range(100)]
    assert max(map(value, others)) < value(here)
    assert value(here) == pytest.approx(BETA * math.log((REFERENCE * np.exp(REWARD / BETA)).sum()), rel=1e-12)


@pytest.mark.parametrize("name", [*INSIDE, "chi_squared"])
def test_the_regularised_argmax_maximises_value_less_divergence(name: str) -> None:
    """With the core's own divergence no step on the simplex gains, beyond rounding."""
    reference, value, beta = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.3, -0.5, 1.2, 0.0]), 0.7
    found = answers.regularised_argmax(reference, value, beta, name)

    def score(p: Array) -> float:
        cost = f_divergence(name).full(torch.from_numpy(p).log(), torch.from_numpy(reference).log())
        return float(value @ p - beta * cost)

    assert found.sum() == pytest.approx(1)
    for other in np.random.default_rng(0).dirichlet(np.ones(4), size=100):
        for share in (1e-3, 0.1, 1.0):
            assert score((1 - share) * found + share * other) < score(found) + 1e-14


SETTINGS: dict[str, tuple[Surrogate, Array]] = {
    "k1 of sequences": (updates.sequence_k1_in_reward(BETA), OPTIMUM),
    "k1 of tokens": (updates.token_k1_in_reward(BETA), solve_token_wise(REFERENCE, REWARD, BETA)),
    "k2": (updates.kl_estimator_loss("k2", BETA), solve_token_wise(REFERENCE, REWARD, BETA)),
    "k3": (updates.kl_estimator_loss("k3", BETA), solve_token_wise(REFERENCE, REWARD, BETA, "forward_kl")),
    "CRD of sums": (updates.centred_distillation(BETA, summed=True), OPTIMUM),
    "CRD of tokens": (updates.centred_distillation(BETA, summed=False), solve_token_wise(REFERENCE, REWARD, BETA)),
    "forward KL of the reference's samples": (
        updates.reference_divergence_loss("forward_kl", BETA),
        answers.solve_sequence_wise(REFERENCE, REWARD, BETA, "forward_kl"),
    ),
    "k3, divided": (
        updates.divide_by_std(updates.kl_estimator_loss("k3", BETA)),
        answers.solve_with_std(lambda beta: solve_token_wise(REFERENCE, REWARD, beta, "forward_kl"), REWARD, BETA),
    ),
    **{f"{n}, full": (updates.divergence_loss(n, BETA), solve_token_wise(REFERENCE, REWARD, BETA, n)) for n in INSIDE},
    **{
        f"{n}, sampled": (updates.sampled_divergence_loss(n, BETA), solve_token_wise(REFERENCE, REWARD, BETA, n))
        for n in INSIDE
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_exact_update_vanishes_at_the_answer_and_not_elsewhere(name: str) -> None:
    surrogate, answer = SETTINGS[name]
    assert np.abs(updates.direction(surrogate, table(answer), BASE, REWARD)).max() < 1e-12
    assert np.abs(updates.direction(surrogate, BASE, BASE, REWARD)).max() > 0.1


@pytest.mark.parametrize("name", ["k1 of sequences", "k2", "k3", "k3, divided", "CRD of sums", "CRD of tokens"])
def test_small_exact_updates_from_the_base_come_to_rest_at_the_answer(name: str) -> None:
    surrogate, answer = SETTINGS[name]
    found = completion_probabilities(updates.find_fixed_point(surrogate, BASE, REWARD))
    assert kl(found, answer) < 1e-12
    assert kl(answer, found) < 1e-12


def test_k1_as_a_loss_adds_nothing_and_a_reward_alone_never_rests() -> None:
    everything = updates.gradient(
        lambda completions: completions.expectation(completions.delta), table(OPTIMUM), BASE, REWARD
    )
    assert np.abs(everything).max() < 1e-15
    with pytest.raises(RuntimeError, match="some letter still gains"):
        updates.find_fixed_point(updates.reward_only, BASE, REWARD, limit=300)


def test_dividing_advantages_leaves_the_optimum_of_k1_in_the_reward_alone() -> None:
    """At the optimum all rewards minus penalties are equal, so advantages are 0 for any standard deviation."""
    cost = np.log(OPTIMUM / REFERENCE)
    assert answers.std(OPTIMUM, REWARD - BETA * cost) < 1e-12
    answer = answers.solve_with_std(lambda beta: solve_token_wise(REFERENCE, REWARD, beta), REWARD, BETA)
    other = solve_token_wise(REFERENCE, REWARD, BETA * (answers.std(answer, REWARD) + 1e-4))
    assert kl(answer, other) < 1e-12
    with pytest.raises(ValueError, match="no fixed point with a coefficient"):
        answers.solve_with_std(lambda beta: solve_token_wise(REFERENCE, REWARD, beta), REWARD, 0.1)


def test_the_answers_differ_by_more_than_training_may_be_off() -> None:
    """Trained models may be off by 0.01 nats in tests/tasks/exact."""
    k2, k3 = (solve_token_wise(REFERENCE, REWARD, BETA, n) for n in ("reverse_kl", "forward_kl"))
    assert min(kl(k2, OPTIMUM), kl(k3, OPTIMUM), kl(k2, k3)) > 0.02


def test_a_moving_old_tilts_again_and_again() -> None:
    """The tilt of the tilt is the tilt of half the beta; in the end only the best completion is left."""
    twice = exponential_tilt(OPTIMUM, REWARD, BETA)
    np.testing.assert_allclose(twice, exponential_tilt(REFERENCE, REWARD, BETA / 2), rtol=1e-12)
    assert exponential_tilt(REFERENCE, REWARD, BETA / 1000).max() == pytest.approx(1)
