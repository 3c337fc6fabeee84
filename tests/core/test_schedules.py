"""Schedules and controllers by hand, and the decays of published methods."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difrl.core import Coefficient, Constant, Cosine, LagrangeMultiplier, Linear, RewardAdaptive, Schedule, TargetKL


def test_constant() -> None:
    assert [Constant(0.5).value(n) for n in (0, 7)] == [0.5, 0.5]
    assert [Constant(0.6, warmup=3).value(n) for n in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.6])


def test_linear_and_cosine_by_hand() -> None:
    assert [Linear(1, 3, 4).value(n) for n in range(6)] == pytest.approx([1, 1.5, 2, 2.5, 3, 3])
    assert [Cosine(1, 0, 4).value(n) for n in range(6)] == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0, 0])
    assert [Linear(1, 0, 2, warmup=2).value(n) for n in range(5)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    assert [Linear(1, 0, 2, warmup=1, hold=2).value(n) for n in range(6)] == pytest.approx([1, 1, 1, 1, 0.5, 0])


@pytest.mark.parametrize(
    ("schedule", "published"),
    [
        (Linear(0.25, 0.999, (0.999 - 0.25) / 0.005), lambda n: min(0.25 + 0.005 * n, 0.999)),
        (Linear(0, 0.999, 0.999 / 0.0075, hold=75), lambda n: min(0.0075 * max(0, n - 75), 0.999)),
        (Linear(0, 0.5, 500), lambda n: min(0.001 * n, 0.5)),
    ],
)
def test_decays_of_crd_and_nft_are_linear_schedules(schedule: Schedule, published: Callable[[int], float]) -> None:
    for n in range(600):
        assert schedule.value(n) == pytest.approx(published(n), abs=1e-12)


def test_coefficients_do_not_adapt_by_default() -> None:
    coefficient = Linear(1, 0, 10)
    assert coefficient.per_sample(5, torch.randn(3)).tolist() == [0.5, 0.5, 0.5]
    assert coefficient.updated(3.0) is coefficient


def test_target_kl_by_hand() -> None:
    """Half the target: e = -0.2 (clipped), x 0.98; on target: x 1; 1.1 times the target: e = 0.1, x 1.01."""
    controller = TargetKL(2.0, target=0.1)
    levels = []
    for divergence in (0.05, 0.1, 0.11, 7.0, 0.0):
        controller = controller.updated(divergence)
        levels.append(controller.value(3))
    expected = [2 * 0.98, 2 * 0.98, 2 * 0.98 * 1.01, 2 * 0.98 * 1.01 * 1.02, 2 * 0.98 * 1.01 * 1.02 * 0.98]
    assert levels == pytest.approx(expected, rel=1e-12)
    assert controller.per_sample(0, torch.zeros(2)).tolist() == pytest.approx([levels[-1]] * 2)


@given(st.floats(1e-6, 1e6), st.floats(0.5, 2.0))
def test_target_kl_holds_a_divergence_that_falls_with_the_level(level: float, power: float) -> None:
    """D = level^-power = target at level 1: the controller reaches it from either side and stays."""
    controller = TargetKL(level, target=1.0, gain=0.5, bound=0.5)
    for _ in range(150):
        controller = controller.updated(controller.value(0) ** -power)
    assert controller.value(0) == pytest.approx(1.0, rel=1e-3)  # every step removes 0.5 % or more of any error


def test_a_controller_is_restored_from_its_state() -> None:
    before = TargetKL(0.3, target=0.1).updated(1.0)
    assert TargetKL(0.3, target=0.1).with_state(before.state()) == before
    assert (Constant(1.0).state(), Linear(0, 1, 2).state()) == ({}, {})


def levels(multiplier: Coefficient, means: list[float]) -> list[float]:
    """Return the value after each update with these means."""
    found = []
    for mean in means:
        multiplier = multiplier.updated(mean)
        found.append(multiplier.value(0))
    return found


def test_multiplier_by_hand() -> None:
    """At least 0.8 with rate 0.5: 0.6 adds 0.1, 0.8 nothing, 1.0 takes 0.1; 9 would go below 0, -9 above 2."""
    at_least = LagrangeMultiplier(1.0, threshold=0.8, rate=0.5, highest=2.0)
    assert levels(at_least, [0.6, 0.8, 1.0, 9.0, -9.0]) == pytest.approx([1.1, 1.1, 1.0, 0.0, 2.0])
    at_most = LagrangeMultiplier(1.0, threshold=0.8, at_least=False, rate=0.5, highest=2.0)
    assert at_most.value(7) == -1.0
    assert levels(at_most, [1.0, 0.8, 0.6, -9.0, 9.0]) == pytest.approx([-1.1, -1.1, -1.0, 0.0, -2.0])


@given(st.floats(-2, 2), st.floats(0, 5), st.booleans())
def test_multiplier_finds_the_solution_of_a_constrained_problem(threshold: float, start: float, at_least: bool) -> None:
    """max -x^2/2 with x on one side of c, by x = argmax -x^2/2 + w x = w: c if the constraint excludes 0, else 0."""
    multiplier: Coefficient = LagrangeMultiplier(start, threshold, at_least, rate=0.2)
    for _ in range(200):
        multiplier = multiplier.updated(multiplier.value(0))
    expected = max(threshold, 0.0) if at_least else min(threshold, 0.0)
    assert multiplier.value(0) == pytest.approx(expected, abs=1e-6)


def test_multiplier_is_restored_from_its_state_and_refuses_bad_numbers() -> None:
    before = LagrangeMultiplier(1.0, threshold=0.5).updated(0.0)
    assert LagrangeMultiplier(1.0, threshold=0.5).with_state(before.state()) == before
    with pytest.raises(ValueError, match="the mean reward is nan"):
        before.updated(float("nan"))
    for wrong in ({"level": -1.0}, {"level": 11.0}, {"level": 1.0, "rate": 0.0}):
        with pytest.raises(ValueError, match="expected a rate above 0 and a level"):
            LagrangeMultiplier(threshold=0.0, **wrong)


def test_reward_adaptive_by_hand() -> None:
    """beta (kappa + (1 - kappa) r), kappa = 1e-4 / beta, r = clip(A, -5, 5) / 10 + 1/2."""
    beta, kappa = 0.1, 1e-4 / 0.1
    found = RewardAdaptive(Constant(beta)).per_sample(
        0, torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 50.0], dtype=torch.float64)
    )
    assert found.tolist() == pytest.approx([beta * (kappa + (1 - kappa) * r) for r in (0, 0, 0.5, 0.75, 1, 1)])
    scheduled = RewardAdaptive(Linear(0.2, 0.0, 10), floor=0.0, limit=1.0)
    assert scheduled.per_sample(5, torch.tensor([1.0])).tolist() == pytest.approx([0.1])
    assert scheduled.value(5) == pytest.approx(0.1)


def test_errors() -> None:
    with pytest.raises(ValueError, match="expected all above 0"):
        TargetKL(0.0, target=1.0)
    with pytest.raises(ValueError, match="gain times bound below 1"):
        TargetKL(1.0, target=1.0, gain=2.0, bound=0.5)
    with pytest.raises(ValueError, match="the divergence is nan"):
        TargetKL(1.0, target=1.0).updated(float("nan"))
    with pytest.raises(ValueError, match="floor is -1"):
        RewardAdaptive(Constant(1.0), floor=-1.0)
    with pytest.raises(ValueError, match="hold -1"):
        Linear(0, 1, 1, hold=-1)
    with pytest.raises(ValueError, match="expected steps > 0"):
        Linear(0, 1, 0)
    with pytest.raises(ValueError, match="warmup is -1"):
        Constant(1.0, warmup=-1)
    with pytest.raises(TypeError, match=r"abstract class Coefficient .* value"):
        Coefficient()
    with pytest.raises(TypeError, match=r"abstract class Schedule .* shape"):
        Schedule(0, 1, 1)
