"""Centred reward distillation: numbers by hand, its optimum, and its invariances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from difrl.core import (
    CentredRewardDistillation,
    Clipped,
    Likelihoods,
    NegativeAware,
    Objective,
    advantages,
    weighted_mean,
)
from tests.fakes import without

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, a handful of operations


def with_delta(delta: list[float]) -> Likelihoods:
    logp = torch.tensor(delta, dtype=torch.float64)[:, None]
    return Likelihoods(
        logp.requires_grad_(),
        torch.ones_like(logp, dtype=torch.bool),
        {"references/old": torch.zeros_like(logp.detach())},
    )


def run(objective: Objective, delta: list[float], a: list[float], groups: list[int]) -> Any:
    lik = with_delta(delta)
    loss, metrics = objective(lik, torch.tensor(a, dtype=torch.float64), torch.tensor(groups))
    (grad,) = torch.autograd.grad(loss.sum(), lik.logp)
    return loss[:, 0].detach(), grad[:, 0], {name: value[:, 0] for name, value in metrics.items()}


def test_squared_by_hand() -> None:
    """a = 2, beta = 0.5: r = (1, 0.75, 0.25, 0.5) and two groups.

    Group 0 holds rows 0 and 2: mean delta 0.2, mean r 0.625. beta (delta - mean) = (0.1, -0.1), r - mean = (0.375,
    -0.375): errors (-0.275, 0.275). Group 1: mean delta -0.3, r 0.625: (0.05, -0.05) - (0.125, -0.125) = (-0.075,
    0.075). a / beta = 4; the gradient is 4 * 2 * error * beta.
    """
    objective = CentredRewardDistillation(beta=0.5, bound=2.0)
    loss, grad, metrics = run(objective, [0.4, -0.2, 0.0, -0.4], [3.0, 1.0, -1.0, 0.0], [0, 1, 0, 1])
    error = torch.tensor([-0.275, -0.075, 0.275, 0.075], dtype=torch.float64)
    torch.testing.assert_close(loss, 4 * error**2, **EXACT)
    torch.testing.assert_close(grad, 4 * error, **EXACT)
    torch.testing.assert_close(metrics["centred/error"], error**2, **EXACT)


def test_bce_by_hand() -> None:
    """-(q log p + (1 - q) log(1 - p)), p = sigmoid(beta D), q = sigmoid(r), centred; its gradient is a (p - q)."""
    objective = CentredRewardDistillation(beta=2.0, bound=1.0, form="bce")
    loss, grad, _ = run(objective, [0.3, -0.3], [1.0, -1.0], [7, 7])
    p = torch.tensor([0.6, -0.6], dtype=torch.float64).sigmoid()
    q = torch.tensor([0.5, -0.5], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(loss, -0.5 * (q * p.log() + (1 - q) * (1 - p).log()), **EXACT)
    torch.testing.assert_close(grad, p - q, **EXACT)


def test_temperature_by_hand() -> None:
    """Raw rewards (log 3, 0) at T = 1: weights (3/4, 1/4) and (1/4, 3/4), so there are two means of each."""
    reward = float(torch.tensor(3.0, dtype=torch.float64).log())
    objective = CentredRewardDistillation(reward="raw", temperature=1.0)
    loss, _, metrics = run(objective, [0.8, 0.0], [reward, 0.0], [0, 0])
    up = [0.8 * 0.25 - reward * 0.25, -0.8 * 0.75 + reward * 0.75]
    down = [0.8 * 0.75 - reward * 0.75, -0.8 * 0.25 + reward * 0.25]
    expected = torch.tensor([0.5 * 0.5 * (u**2 + d**2) for u, d in zip(up, down, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(metrics["centred/error"], expected / 0.5, **EXACT)


def test_the_loss_is_zero_where_the_policy_is_tilted() -> None:
    """D = r / beta + a constant of each group has no gradient, in both forms and in every direction."""
    r = [0.3, -1.0, 2.0, 0.7]
    for form in ("squared", "bce"):
        for temperature in (None, 0.3):
            objective = CentredRewardDistillation(beta=0.5, form=form, reward="raw", temperature=temperature)
            delta = [r[0] / 0.5 + 3, r[1] / 0.5 + 3, r[2] / 0.5 - 1, r[3] / 0.5 - 1]
            _, grad, metrics = run(objective, delta, r, [0, 0, 1, 1])
            torch.testing.assert_close(grad, torch.zeros(4, dtype=torch.float64), **EXACT)
            assert metrics["centred/error"].abs().max() < 1e-24


ROWS = st.lists(st.tuples(st.floats(-2, 2), st.floats(-4, 4), st.integers(0, 2)), min_size=1, max_size=8)


@settings(max_examples=50)
@given(
    ROWS,
    st.tuples(*[st.floats(-3, 3)] * 3),
    st.sampled_from([None, 0.4]),
    st.sampled_from(["squared", "bce"]),
    st.floats(0.2, 3),
)
def test_a_constant_added_to_a_group_changes_nothing(
    rows: list[Any], shifts: tuple[float, ...], temperature: float | None, form: Any, beta: float
) -> None:
    """The constant may be added to rewards or to log ratios: both are centred."""
    objective = CentredRewardDistillation(beta=beta, form=form, reward="raw", temperature=temperature)
    delta, a, groups = map(list, zip(*rows, strict=True))
    loss, grad, _ = run(objective, delta, a, groups)
    moved_delta = [d + shifts[2 - g] for d, g in zip(delta, groups, strict=True)]
    moved_a = [r + shifts[g] for r, g in zip(a, groups, strict=True)]
    again, moved, _ = run(objective, moved_delta, moved_a, groups)
    # sums of values up to 10 in float64, and their squares
    torch.testing.assert_close(again, loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved, grad, rtol=1e-9, atol=1e-9)


def unclipped_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    return advantages(rewards, groups, torch.ones_like(rewards, dtype=torch.bool))


@pytest.mark.parametrize(
    "objective",
    [
        Clipped(0.1, 0.1),
        CentredRewardDistillation(),
        CentredRewardDistillation(beta=0.3),
        CentredRewardDistillation(reward="raw", beta=2.0),
        NegativeAware(mix=0.7),
        NegativeAware(mix=0.7, bound=9.0),
    ],
    ids=str,
)
def test_crd_awm_and_nft_share_one_gradient(fake_policy: Any, objective: Objective) -> None:
    """At theta = old, with equal weights and centred, unclipped advantages, it is exactly -A grad l."""
    policy = fake_policy.make(12, 3, shift=0.0)
    policy.mask[:] = True
    groups = torch.arange(12) % 3
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a = unclipped_advantages(rewards, groups)
    lik = without(policy.likelihoods(), "weight")
    loss, _ = objective(lik, a, groups)
    expected = policy.grad(weighted_mean(-a[:, None] * lik.logp, lik.mask, 36))
    torch.testing.assert_close(policy.grad(weighted_mean(loss, lik.mask, 36)), expected, **EXACT)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="bound is 0"):
        CentredRewardDistillation(bound=0.0)
    with pytest.raises(ValueError, match="beta is -1"):
        CentredRewardDistillation(beta=-1.0)
    with pytest.raises(ValueError, match="temperature 0"):
        CentredRewardDistillation(temperature=0.0)
    with pytest.raises(ValueError, match="form is 'cubed'"):
        CentredRewardDistillation(form="cubed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bound is -1"):
        NegativeAware(bound=-1.0)
    with pytest.raises(ValueError, match="mix is 0"):
        NegativeAware(mix=0.0)
