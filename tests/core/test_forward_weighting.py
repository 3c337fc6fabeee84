"""Forward likelihoods: by hand, and the bound against the closed form of Gaussian data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from difrl.core import WEIGHTINGS, elbo, forward_logp


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("uniform", -4.0),
        ("t", -2.0),
        ("t2", -1.0),
        ("huber", -0.5 * (math.sqrt(4 + 1e-10) - 1e-5)),
        ("ghuber", -0.5 / 0.25 * ((4 + 1e-10) ** 0.25 - 1e-10**0.25)),
        ("adaptive", -4.0 / 1.5),
    ],
)
def test_by_hand(weighting: str, expected: float) -> None:
    """Errors 0, 1, 2, ... with mean square 4 and mean size 1.5, at t = 1/2; a second row without error."""
    out = torch.tensor([[[3.0, -3.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    out[0] *= math.sqrt(4 / 4.5)
    scale = out[0].abs().mean().item() / 1.5
    target = torch.zeros_like(out)
    target[1] = 1.0
    found = forward_logp(out, target, torch.tensor([0.5, 0.5]), weighting)
    expected = expected / scale if weighting == "adaptive" else expected
    assert found.tolist() == pytest.approx([expected, 0.0], abs=1e-12)


@pytest.mark.parametrize("weighting", sorted(WEIGHTINGS))
def test_gradients_are_finite_where_the_error_is_zero(weighting: str) -> None:
    out = torch.ones(2, 3, requires_grad=True)
    forward_logp(out, torch.ones(2, 3), torch.tensor([0.3, 0.9]), weighting).sum().backward()
    assert torch.equal(out.grad, torch.zeros(2, 3))


def test_the_divisor_of_adaptive_has_no_gradient() -> None:
    out, target, t = (
        torch.randn(4, 6, dtype=torch.float64, requires_grad=True),
        torch.zeros(4, 6),
        torch.ones(4),
    )
    (found,) = torch.autograd.grad(forward_logp(out, target, t, "adaptive").sum(), out)
    torch.testing.assert_close(found, -2 * out / 6 / out.abs().mean(1, keepdim=True))


def test_half_precision_is_raised_before_subtracting() -> None:
    out, target = torch.tensor([[256.0]], dtype=torch.bfloat16), torch.tensor([[255.5]])
    assert forward_logp(out, target, torch.tensor([1.0]), "uniform").item() == -0.25


def test_both_sides_are_raised() -> None:
    """256 - 0.5 is 256 in bfloat16, of 8 bits."""
    large, small, one = torch.tensor([[256.0]]).bfloat16(), torch.tensor([[0.5]]).bfloat16(), torch.ones(1)
    assert forward_logp(large, small, one, "uniform").item() == -(255.5**2)
    found = elbo(small, large, one / 2, log_snr_rate=2 * one, density=one, cutoff=1e-3)
    assert found.item() == -(255.5**2)


def test_adaptive_weights_are_at_most_1e5() -> None:
    """Errors of 1e-6: 1e-12 over 1e-5, not over their own size."""
    found = forward_logp(torch.full((1, 4), 1e-6), torch.zeros(1, 4), torch.ones(1), "adaptive")
    assert found.item() == pytest.approx(-1e-7, rel=1e-6)


def noise_estimate(t: Tensor, x0: Tensor, eps: Tensor, mean: float, variance: float) -> Tensor:
    """Return the exact E[eps | x_t] at x_t = (1 - t) x0 + t eps, for data N(mean, variance)."""
    x = (1 - t) * x0 + t * eps
    marginal = (1 - t) ** 2 * variance + t**2
    return t * (x - (1 - t) * mean) / marginal


def test_elbo_equals_its_velocity_form_for_flow_matching() -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps, out = torch.randn(3, 5, 4, generator=g, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    eps_hat = (1 - t[:, None]) * x0 + t[:, None] * eps + (1 - t[:, None]) * out
    found = elbo(eps, eps_hat, t, log_snr_rate=2 / (t * (1 - t)), density=torch.full_like(t, 0.5), cutoff=1e-3)
    expected = -((1 - t) / t) * (out - (eps - x0)).square().sum(1) / 0.5
    torch.testing.assert_close(found, expected)


def hermite(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of Gauss quadrature for the standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return nodes, weights / weights.sum()


def test_elbo_differences_are_those_of_log_density() -> None:
    """With the exact denoiser of N(m, v), the mean of elbo over (t, eps) is log N(x; m, v) up to a constant.

    The mean over eps is computed by quadrature, the mean over t by the midpoint rule. Times below the cutoff, 1e-4,
    contribute to the difference at that order."""
    m, v = 0.7, 0.5
    nodes, weights = (torch.tensor(x) for x in hermite(9))
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 * (1 - 1e-4) + 1e-4

    def bound(x: float) -> Tensor:
        values = torch.zeros((), dtype=torch.float64)
        for node, w in zip(nodes, weights, strict=True):
            eps, x0 = node.expand(4000, 1), torch.full((4000, 1), x, dtype=torch.float64)
            eps_hat = noise_estimate(t[:, None], x0, eps, m, v)
            rate, density = 2 / (t * (1 - t)), torch.full_like(t, 1 / (1 - 1e-4))
            values += w * elbo(eps, eps_hat, t, rate, density, cutoff=1e-4).mean()
        return values

    for x in (-1.0, 0.0, 2.0):
        exact = (-((x - m) ** 2) + m**2) / (2 * v)
        assert (bound(x) - bound(0.0)).item() == pytest.approx(exact, abs=2e-3)


def test_below_the_cutoff_the_bound_has_no_weight() -> None:
    """It has no gradient there either, though the rate may be infinite. At the cutoff itself it has weight."""
    x, t = torch.ones(2, 3), torch.tensor([0.0, 0.5])
    eps_hat = torch.zeros(2, 3, requires_grad=True)
    found = elbo(x, eps_hat, t, torch.tensor([torch.inf, 2.0]), torch.ones(2), cutoff=0.5)
    assert found.tolist() == [0.0, -3.0]
    found.sum().backward()
    assert eps_hat.grad is not None
    assert eps_hat.grad.tolist() == [[0.0] * 3, [2.0] * 3]


def test_errors() -> None:
    x, t = torch.ones(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match=r"no weighting 'elbow', expected one of \['adaptive', 'ghuber'"):
        forward_logp(x, x, t, "elbow")
    with pytest.raises(ValueError, match=r"shapes \[\[2, 3\], \[2, 3\], \[3\]\]"):
        forward_logp(x, x, torch.ones(3), "uniform")
