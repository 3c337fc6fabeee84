"""Clip-Cov and KL-Cov: numbers by hand, the mean over all draws, and an independent covariance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from difrl.core import ClipCov, Clipped, KLCov, Likelihoods
from difrl.core.objectives.covariance import covariances


def likelihoods(logp: list[list[float]], log_ratio: list[list[float]], mask: list[list[bool]]) -> Likelihoods:
    at = torch.tensor(logp, dtype=torch.float64)
    old = at - torch.tensor(log_ratio, dtype=torch.float64)
    return Likelihoods(at.requires_grad_(), torch.tensor(mask), {"references/old": old})


def by_hand() -> tuple[Likelihoods, Tensor, Tensor]:
    """Return three unmasked decisions: l = -1, -2, -6 about -3, A = 2, 2, -1 about 1, cov = 2 x 1, 1 x 1, -3 x -2."""
    log_ratio = [[math.log(1.5), math.log(0.8)], [math.log(0.5), 7.0]]
    lik = likelihoods([[-1.0, -2.0], [-6.0, 50.0]], log_ratio, [[True, True], [True, False]])
    return lik, torch.tensor([2.0, -1.0]), torch.tensor([0, 1])


def test_covariances_by_hand() -> None:
    lik, a, _ = by_hand()
    found = covariances(lik.logp.detach(), a[:, None].expand(2, 2), lik.mask)
    assert found.tolist() == [[2.0, 1.0], [6.0, 0.0]]


def test_the_mean_of_covariances_is_that_of_numpy() -> None:
    g = torch.Generator().manual_seed(0)
    logp, a = (torch.randn(7, 5, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(7, 5, generator=g) < 0.7
    found = covariances(logp, a, mask).sum() / mask.sum()
    expected = np.cov(logp[mask].numpy(), a[mask].numpy(), bias=True)[0, 1]
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_float32_results_do_not_depend_on_the_order_of_rows() -> None:
    g = torch.Generator().manual_seed(0)
    logp, a = torch.randn(2, 400, 7, generator=g) * 100
    mask, order = torch.rand(400, 7, generator=g) < 0.9, torch.randperm(400, generator=g)
    assert torch.equal(covariances(logp, a, mask)[order], covariances(logp[order], a[order], mask[order]))


def test_clip_cov_by_hand() -> None:
    """Two of three are between 0.5 and 5; a third of all is one decision, so each of the two is left out half the time."""
    lik, a, groups = by_hand()
    loss, metrics = ClipCov(None, None, share=1 / 3, lowest=0.5, highest=5.0)(lik, a, groups)
    (grad,) = torch.autograd.grad(loss[lik.mask].sum(), lik.logp)
    assert metrics["covariance/held"].flatten().tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0])
    assert loss[lik.mask].tolist() == pytest.approx([-2 * 1.5 / 2, -2 * 0.8 / 2, 0.5])
    assert grad[lik.mask].tolist() == pytest.approx([-1.5, -0.8, 0.5])


def test_decisions_that_are_clipped_are_not_drawn() -> None:
    """rho = 1.5 with A > 0 is above 1.2: one candidate remains between the bounds, and the share removes all of it."""
    lik, a, groups = by_hand()
    loss, metrics = ClipCov(0.6, 0.2, share=0.5, lowest=0.5, highest=5.0)(lik, a, groups)
    assert metrics["covariance/held"].flatten().tolist() == pytest.approx([0.0, 1.0, 0.0, 0.0])
    assert loss[lik.mask].tolist() == pytest.approx([-2 * 1.2, 0.0, 0.5])


@pytest.mark.parametrize(("share", "held"), [(2e-4, 0.5), (0.6, 0.5), (2 / 3, 1.0)])
def test_at_least_one_whole_decision_is_left_out(share: float, held: float) -> None:
    """Two of three decisions are candidates. The authors draw max(int(share 3), 1) of them."""
    lik, a, groups = by_hand()
    _, metrics = ClipCov(None, None, share=share, lowest=0.5, highest=5.0)(lik, a, groups)
    assert metrics["covariance/held"].flatten().tolist() == pytest.approx([held, held, 0.0, 0.0])


def test_clip_cov_is_the_mean_over_every_draw() -> None:
    """Two of nine decisions between the bounds are drawn and detached; loss and gradient are averaged over all draws."""
    g = torch.Generator().manual_seed(1)
    logp, a = torch.randn(3, 3, generator=g, dtype=torch.float64), torch.tensor([1.0, -0.5, 2.0])
    every = [[True] * 3] * 3
    lik = likelihoods(logp.tolist(), (0.1 * torch.randn(3, 3, generator=g)).tolist(), every)
    objective = ClipCov(None, None, share=2 / 9, lowest=-0.5, highest=0.5)
    loss, metrics = objective(lik, a, torch.arange(3))
    (grad,) = torch.autograd.grad(loss.sum(), lik.logp)
    plain, _ = Clipped(None, None)(lik, a, torch.arange(3))
    (whole,) = torch.autograd.grad(plain.sum(), lik.logp)
    between = metrics["covariance/held"].nonzero().tolist()
    assert len(between) > 2
    draws = []
    for drawn in itertools.combinations(between, 2):
        keep = torch.ones(3, 3, dtype=torch.float64)
        for i, j in drawn:
            keep[i, j] = 0.0
        draws.append(keep)
    mean = torch.stack(draws).mean(0)
    torch.testing.assert_close(loss, mean * plain)
    torch.testing.assert_close(grad, mean * whole)


def test_kl_cov_by_hand() -> None:
    """Half of three is one: the decision with covariance 6, whose |log rho| = log 2 falls as rho rises."""
    lik, a, groups = by_hand()
    loss, metrics = KLCov(share=0.5, coefficient=3.0)(lik, a, groups)
    (grad,) = torch.autograd.grad(loss[lik.mask].sum(), lik.logp)
    assert metrics["covariance/held"].flatten().tolist() == [0.0, 0.0, 1.0, 0.0]
    assert loss[lik.mask].tolist() == pytest.approx([-3.0, -1.6, 0.5 + 3 * math.log(2)])
    assert grad[lik.mask].tolist() == pytest.approx([-3.0, -1.6, 0.5 - 3.0])


def test_kl_cov_takes_at_least_one_and_all_of_equal_covariance() -> None:
    lik = likelihoods([[-1.0], [-1.0], [-4.0]], [[0.0]] * 3, [[True]] * 3)
    _, metrics = KLCov(share=1e-3)(lik, torch.tensor([1.0, 1.0, 2.0]), torch.arange(3))
    assert metrics["covariance/held"][:, 0].tolist() == [1.0, 1.0, 0.0]


def test_kl_cov_has_the_plain_gradient_at_old() -> None:
    lik = likelihoods([[-1.0], [-3.0]], [[0.0], [0.0]], [[True], [True]])
    a, groups = torch.tensor([1.0, -2.0]), torch.arange(2)
    (found,) = torch.autograd.grad(KLCov(share=1.0)(lik, a, groups)[0].sum(), lik.logp)
    assert found[:, 0].tolist() == [-1.0, 2.0]


def test_a_batch_without_decisions_is_no_error() -> None:
    lik = likelihoods([[-1.0]], [[0.0]], [[False]])
    for objective in (ClipCov(), KLCov()):
        loss, _ = objective(lik, torch.tensor([1.0]), torch.tensor([0]))
        assert loss.isfinite().all()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ClipCov(share=0.0), "share is 0"),
        (lambda: ClipCov(lowest=2.0, highest=1.0), r"lowest is 2\.0 and highest 1\.0"),
        (lambda: ClipCov(low=-1.0), "clip low is -1"),
        (lambda: KLCov(share=1.5), "share is 1.5"),
        (lambda: KLCov(coefficient=0.0), "coefficient is 0"),
    ],
)
def test_refusals(make: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()  # type: ignore[operator]
