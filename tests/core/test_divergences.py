"""Divergences: exact ones against torch.distributions, estimators by their means and their gradients."""

from __future__ import annotations

import pytest
import torch

from difrl.core import LOSS_ESTIMATORS, k1, k2, k3, velocity


def test_velocity_by_hand() -> None:
    out = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]], requires_grad=True)
    ref = torch.tensor([[[0.0, 4.0]], [[3.0, 0.0]]], requires_grad=True)
    found = velocity(out, ref)
    assert found.tolist() == [2.5, 4.5]
    found.sum().backward()
    assert out.grad.tolist() == [[[1.0, -2.0]], [[-3.0, 0.0]]]
    assert ref.grad is None
    assert velocity(out.bfloat16(), ref.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"out has shape \[2, 1, 2\] and ref \[2, 2\]"):
        velocity(out, ref[:, 0])


def test_estimators_by_hand() -> None:
    """l_theta - l_ref = log 2: u = -log 2."""
    logp, ref = torch.tensor([2.0]).log().double(), torch.zeros(1).double()
    log2 = torch.tensor([2.0], dtype=torch.float64).log()
    torch.testing.assert_close(k1(logp, ref), log2)
    torch.testing.assert_close(k2(logp, ref), log2**2 / 2)
    torch.testing.assert_close(k3(logp, ref), 0.5 - 1 + log2)


def discrete() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    ref = (logits.detach() + 0.1 * torch.randn(6, generator=g, dtype=torch.float64)).log_softmax(0)
    return logits, ref


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum()


def test_values_estimate_kl_of_theta_from_the_reference() -> None:
    """Means over theta, by enumeration: k1 and k3 exactly, k2 to second order (the third-order term is a tenth)."""
    logits, ref = discrete()
    logp = logits.detach().log_softmax(0)
    exact = kl(logp, ref)
    for estimator, rtol in ((k1, 1e-12), (k3, 1e-12), (k2, 0.1)):
        torch.testing.assert_close((logp.exp() * estimator(logp, ref)).sum(), exact, rtol=rtol, atol=1e-15)


def test_gradients_as_losses_are_those_in_the_docstrings() -> None:
    """The expected gradient on samples of theta: sum_y pi(y) grad k(y), with the sampling held fixed."""
    logits, ref = discrete()
    logp = logits.log_softmax(0)

    def grad(scalar: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(scalar, logits, retain_graph=True)[0]

    p = logp.detach().exp()
    torch.testing.assert_close(grad((p * k1(logp, ref)).sum()), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(grad((p * k2(logp, ref)).sum()), grad(kl(logp, ref)))
    torch.testing.assert_close(grad((p * k3(logp, ref)).sum()), grad(kl(ref, logp)))
    assert {"k2": k2, "k3": k3} == LOSS_ESTIMATORS
