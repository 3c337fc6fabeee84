"""Ratio normalisation and divergence masking by hand. Their statistics on samples of old are in test_contract.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from difrl.core import Clipped, DivergenceMasked, Likelihoods, RatioNormalised, to_unit_interval


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def with_ratio(log_ratio: Tensor, **terms: Tensor) -> Likelihoods:
    return Likelihoods(
        log_ratio.clone().requires_grad_(),
        torch.ones_like(log_ratio, dtype=torch.bool),
        {"references/old": torch.zeros_like(log_ratio), **terms},
    )


def test_normalised_ratio_by_hand() -> None:
    """log rho~ = 0.5 (log rho + 0.2): rho = exp(0.2) becomes exp(0.2), above 1.1; exp(-0.6) becomes exp(-0.2), below."""
    lik = with_ratio(column(0.2, -0.6), bias=column(0.2, 0.2), scale=column(0.5, 0.5), weight=column(2.0, 3.0))
    loss, metrics = RatioNormalised(0.1, 0.1)(lik, torch.tensor([1.0, 1.0]), torch.tensor([0, 1]))
    (grad,) = torch.autograd.grad(loss.sum(), lik.logp)
    assert loss[:, 0].tolist() == pytest.approx([-2 * 1.1, -3 * math.exp(-0.2)])
    assert grad[:, 0].tolist() == pytest.approx([0.0, -3 * 0.5 * math.exp(-0.2)])
    assert metrics["ratio/normalised"][:, 0].tolist() == pytest.approx([math.exp(0.2), math.exp(-0.2)])
    assert metrics["ratio"][:, 0].tolist() == pytest.approx([math.exp(0.2), math.exp(-0.6)])
    assert metrics["clip_high"][:, 0].tolist() == [1, 0]


def test_estimated_bias_is_the_mean_of_each_decision() -> None:
    """Columns (0.1, -0.3) and (0.5, masked): biases 0.1 and -0.5, both constant; with scale 1 the rest is Clipped."""
    log_ratio = torch.tensor([[0.1, 0.5], [-0.3, 99.0]], dtype=torch.float64)
    lik = Likelihoods(
        log_ratio.requires_grad_(),
        torch.tensor([[True, True], [True, False]]),
        {"references/old": torch.zeros(2, 2, dtype=torch.float64), "scale": torch.ones(2, 2, dtype=torch.float64)},
    )
    a = torch.tensor([1.0, -1.0])
    _, metrics = RatioNormalised(bias="batch")(lik, a, torch.tensor([0, 1]))
    found = metrics["ratio/normalised"].log()[lik.mask].tolist()
    assert found == pytest.approx([0.2, 0.0, -0.2])


def test_the_bias_carries_its_gradient() -> None:
    """For one Gaussian step d log rho~ / d mean = z / D for every difference of means, unlike the gradient of log rho."""
    z, std = torch.tensor([[0.7, -0.4]], dtype=torch.float64), 0.3
    mean = torch.tensor([[0.5, -0.2]], dtype=torch.float64, requires_grad=True)
    x = std * z  # old has mean 0
    logp = -0.5 * ((x - mean) / std).square().mean(1, keepdim=True)
    old = -0.5 * z.square().mean(1, keepdim=True)
    bias = mean.square().mean(1, keepdim=True) / (2 * std**2)
    lik = Likelihoods(logp, torch.tensor([[True]]), {"references/old": old, "bias": bias, "scale": column(std)})
    _, metrics = RatioNormalised()(lik, torch.tensor([1.0]), torch.tensor([0]))
    normalised = float((z * mean).mean())
    assert float(metrics["ratio/normalised"].log()) == pytest.approx(normalised, rel=1e-12)
    loss, _ = RatioNormalised(None, None)(lik, torch.tensor([1.0]), torch.tensor([0]))
    (grad,) = torch.autograd.grad(loss.sum(), mean)
    torch.testing.assert_close(grad, -math.exp(normalised) * z / 2, rtol=1e-12, atol=1e-12)


def test_masking_by_hand() -> None:
    """Far (KL 0.5 >= 0.5) and near rows, leading away and back, for both signs; A = 0 never matters."""
    ratio = [1.5, 0.5, 1.5, 0.5, 1.5]
    a = [1.0, 1.0, -1.0, -1.0, 1.0]
    kl = column(0.5, 0.5, 0.5, 0.5, 0.4999)
    lik = with_ratio(column(*(math.log(r) for r in ratio)), bias=kl)
    loss, metrics = DivergenceMasked(0.5)(lik, torch.tensor(a), torch.arange(5))
    (grad,) = torch.autograd.grad(loss.sum(), lik.logp)
    assert loss[:, 0].tolist() == pytest.approx([0.0, -0.5, 1.5, 0.0, -1.5])
    assert grad[:, 0].tolist() == pytest.approx([0.0, -0.5, 1.5, 0.0, -1.5])
    assert metrics["trust/dropped"][:, 0].tolist() == [1, 0, 0, 1, 0]
    torch.testing.assert_close(metrics["trust/kl"], kl)


def test_an_infinite_region_is_the_plain_policy_gradient() -> None:
    lik = with_ratio(column(0.3, -0.2), bias=column(5.0, 7.0))
    a, groups = torch.tensor([1.0, -2.0]), torch.arange(2)
    masked, plain = DivergenceMasked(math.inf)(lik, a, groups)[0], Clipped(None, None)(lik, a, groups)[0]
    torch.testing.assert_close(masked, plain)


def test_to_unit_interval_by_hand() -> None:
    assert to_unit_interval(torch.tensor([-9.0, -5.0, 0.0, 2.5, 9.0]), 5.0).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="delta is 0"):
        DivergenceMasked(0.0)
    with pytest.raises(ValueError, match="bias is 'none'"):
        RatioNormalised(bias="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs \['bias'\]"):
        DivergenceMasked()(with_ratio(column(0.0)), torch.tensor([1.0]), torch.tensor([0]))
