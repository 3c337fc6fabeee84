"""The clipped surrogate: numbers by hand, its gradient at old, and its bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difrl.core import Clipped, Likelihoods, weighted_mean


def single(ratio: list[float], **terms: torch.Tensor) -> Likelihoods:
    logp = torch.tensor([ratio], dtype=torch.float64).log().T
    return Likelihoods(
        logp.requires_grad_(),
        torch.ones_like(logp, dtype=torch.bool),
        {"references/old": torch.zeros_like(logp.detach()), **terms},
    )


def run(objective: Clipped, ratio: list[float], a: list[float], **terms: torch.Tensor) -> Any:
    lik = single(ratio, **terms)
    loss, metrics = objective(lik, torch.tensor(a), torch.arange(len(a)))
    (grad,) = torch.autograd.grad(loss.sum(), lik.logp)
    return loss[:, 0].tolist(), grad[:, 0].tolist(), {name: m[:, 0].tolist() for name, m in metrics.items()}


def test_clipped_by_hand() -> None:
    """low 0.1, high 0.2. A > 0 stops above 1.2, A < 0 stops below 0.9; the other side is never clipped."""
    ratios, a = [1.5, 0.5, 1.5, 0.5, 1.1, 1.5, 0.5], [2.0, 2.0, -2.0, -2.0, 2.0, 0.0, 0.0]
    loss, grad, metrics = run(Clipped(0.1, 0.2), ratios, a)
    assert loss == pytest.approx([-2.4, -1.0, 3.0, 1.8, -2.2, 0.0, 0.0])
    assert grad == pytest.approx([0.0, -1.0, 3.0, 0.0, -2.2, 0.0, 0.0])
    assert metrics["ratio"] == pytest.approx(ratios)
    assert metrics["clip_high"] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert metrics["clip_low"] == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert "clip_dual" not in metrics
    assert metrics["approx_kl"][0] == pytest.approx(0.5 - math.log(1.5))


def test_dual_clip_by_hand() -> None:
    """Where A < 0 the loss is at most |A| times 3: it grows with the ratio until then, and A > 0 is as without."""
    ratios, a = [2.0, 4.0, 4.0, 0.5, 4.0], [-2.0, -2.0, 2.0, -2.0, 0.0]
    loss, grad, metrics = run(Clipped(0.1, 0.2, dual=3.0), ratios, a)
    assert loss == pytest.approx([4.0, 6.0, -2.4, 1.8, 0.0])
    assert grad == pytest.approx([4.0, 0.0, 0.0, 0.0, 0.0])
    assert metrics["clip_dual"] == [0.0, 1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"dual is 1\.0, expected a ratio above 1"):
        Clipped(dual=1.0)


@given(st.floats(0.01, 9.0), st.floats(-3.0, 3.0), st.floats(1.01, 8.0))
def test_dual_clip_is_that_of_verl(ratio: float, a: float, dual: float) -> None:
    """max(-A rho, -A clip(rho)), and where A < 0 the smaller of it and -A c."""
    loss, _, _ = run(Clipped(0.2, 0.28, dual=dual), [ratio], [a])
    plain = max(-a * ratio, -a * min(max(ratio, 0.8), 1.28))
    assert loss[0] == pytest.approx(min(plain, -a * dual) if a < 0 else plain, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("none", [None, math.inf])
def test_without_a_bound_nothing_is_clipped(none: float | None) -> None:
    loss, grad, metrics = run(Clipped(none, none), [9.0, 0.1], [1.0, -1.0])
    assert loss == pytest.approx([-9.0, 0.1])
    assert grad == pytest.approx([-9.0, 0.1])
    assert metrics["clip_high"] == metrics["clip_low"] == [0.0, 0.0]


def test_the_weight_multiplies_the_loss_alone() -> None:
    weight = torch.tensor([[3.0], [0.5]], dtype=torch.float64)
    loss, grad, metrics = run(Clipped(), [1.1, 0.9], [1.0, -1.0], weight=weight)
    assert loss == pytest.approx([-3.3, 0.45])
    assert grad == pytest.approx([-3.3, 0.45])
    assert metrics["ratio"] == pytest.approx([1.1, 0.9])


@pytest.mark.parametrize("objective", [Clipped(), Clipped(0.0, 0.0), Clipped(1.0, 1.0), Clipped(1e-4, None)])
def test_the_gradient_at_the_old_policy_is_minus_a_grad_l(fake_policy: Any, objective: Clipped) -> None:
    """This includes the kink of a zero clip range, where both branches of the maximum are equal."""
    policy = fake_policy.make(6, 4, shift=0.0)
    lik, a = policy.likelihoods(), torch.linspace(-2, 3, 6).double()
    loss, metrics = objective(lik, a, torch.arange(6))
    found = policy.grad(weighted_mean(loss, lik.mask, 1.0))
    expected = policy.grad((-a[:, None] * lik.logp * lik["weight"] * lik.mask).sum())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(metrics["ratio"], torch.ones_like(loss))


def test_advantages_may_differ_by_decision(fake_policy: Any) -> None:
    lik = fake_policy.make(3, 4).likelihoods()
    a = torch.arange(12.0).reshape(3, 4)
    loss, _ = Clipped()(lik, a, torch.arange(3))
    for j in range(4):
        column = lik.map(lambda x, j=j: x[:, j : j + 1])
        torch.testing.assert_close(loss[:, j : j + 1], Clipped()(column, a[:, j], torch.arange(3))[0])


@given(st.floats(-3, 3), st.floats(-5, 5), st.floats(0, 2), st.floats(0, 2), st.floats(0, 1), st.floats(0, 1))
def test_a_wider_clip_range_never_raises_the_loss(
    log_ratio: float, a: float, low: float, high: float, more_low: float, more_high: float
) -> None:
    """The loss is a maximum of two, and the clipped one approaches the other as the range widens."""
    lik = Likelihoods(
        torch.tensor([[log_ratio]], dtype=torch.float64),
        torch.tensor([[True]]),
        {"references/old": torch.zeros(1, 1, dtype=torch.float64)},
    )
    a_, g = torch.tensor([a], dtype=torch.float64), torch.tensor([0])
    narrow = Clipped(low, high)(lik, a_, g)[0]
    wide = Clipped(low + more_low, high + more_high)(lik, a_, g)[0]
    free = Clipped(None, None)(lik, a_, g)[0]
    assert free.item() <= wide.item() + 1e-12 <= narrow.item() + 2e-12


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="clip low is -0"):
        Clipped(low=-0.1)
    with pytest.raises(ValueError, match="clip high is nan"):
        Clipped(high=math.nan)
