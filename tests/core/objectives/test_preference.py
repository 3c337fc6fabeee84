"""DPO and its relatives: each against its explicit formula over pairs; limits and symmetries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from difrl.core import AnchoredPreference, Likelihoods, Objective, Preference, weighted_mean

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, a handful of operations


def run(
    objective: Objective, delta: Tensor, a: Tensor, groups: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return mean loss, its gradient with respect to delta [B, J], and mean metrics."""
    logp = delta.double().reshape(len(delta), -1).clone().requires_grad_()
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    zero = torch.zeros_like(logp.detach())
    loss, metrics = objective(
        Likelihoods(logp, mask, {"references/base": zero, "references/old": zero}), a.double(), groups
    )
    total = weighted_mean(loss, mask, mask.sum())
    (grad,) = torch.autograd.grad(total, logp)
    return total.detach(), grad, {name: float(weighted_mean(m, mask, mask.sum())) for name, m in metrics.items()}


def pairs(margins: Callable[[Tensor, Tensor], Tensor], delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of a loss of (delta of winners, of losers) over rows (0, 1), (2, 3), … and its gradient by autograd."""
    delta = delta.double().clone().requires_grad_()
    total = margins(delta[0::2], delta[1::2]).mean()
    return total.detach(), torch.autograd.grad(total, delta)[0]


def dpo(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda won, lost: -(1 / (1 + (-beta * (won - lost)).exp())).log()


def alpha_form(won: Tensor, lost: Tensor) -> Tensor:
    """f-DPO with f' = (1 - u^-a) / a, a = 0.5, beta = 2."""
    return -(2.0 * ((1 - won.exp() ** -0.5) / 0.5 - (1 - lost.exp() ** -0.5) / 0.5)).sigmoid().log()


def jensen_shannon(won: Tensor, lost: Tensor) -> Tensor:
    u, v = won.exp(), lost.exp()
    return -((2 * u / (1 + u)).log() - (2 * v / (1 + v)).log()).sigmoid().log()


def robust(won: Tensor, lost: Tensor) -> Tensor:
    """rDPO at e = 0.2, beta = 1.5."""
    return (0.8 * dpo(1.5)(won, lost) - 0.2 * dpo(1.5)(lost, won)) / 0.6


@pytest.mark.parametrize(
    ("objective", "direct"),
    [
        (Preference(beta=0.7), dpo(0.7)),
        (Preference(beta=1.5, flip=0.2), robust),
        (Preference(beta=0.25, loss="squared"), lambda won, lost: (won - lost - 2.0) ** 2),
        (Preference(beta=2.0, divergence="alpha"), alpha_form),
        (Preference(beta=1.0, divergence="jensen_shannon"), jensen_shannon),
        (
            Preference(beta=1.0, divergence="forward_kl"),
            lambda won, lost: -(1 / lost.exp() - 1 / won.exp()).sigmoid().log(),
        ),
    ],
    ids=["DPO", "rDPO", "IPO", "alpha", "Jensen-Shannon", "forward KL"],
)
def test_the_mean_over_rows_is_the_mean_over_pairs(objective: Objective, direct: Any) -> None:
    delta = torch.tensor([0.3, -0.2, -0.5, 0.9, 1.1, 0.4])
    a = torch.tensor([1.0, -1.0, 0.2, 0.1, 3.0, -3.0])
    groups = torch.tensor([4, 4, 9, 9, -2, -2])
    expected, slope = pairs(direct, delta)
    total, grad, _ = run(objective, delta, a, groups)
    torch.testing.assert_close(total, expected, **EXACT)
    torch.testing.assert_close(grad[:, 0], slope, **EXACT)


def test_best_against_worst_by_hand() -> None:
    """The first of two best of four samples against the worst; a group with equal advantages has no loss but counts.

    Eight rows, two groups of four: half of -log sigmoid(0.5 * (0.6 - 0.1)).
    """
    delta = torch.tensor([0.2, 0.6, 0.1, 0.9, 5.0, 6.0, 7.0, 8.0])
    a = torch.tensor([0.0, 2.0, -1.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    total, grad, metrics = run(Preference(beta=0.5), delta, a, groups)
    # float32 inputs
    assert float(total) == pytest.approx(0.5 * math.log1p(math.exp(-0.25)), rel=1e-6)
    slope = -0.5 * 0.5 / (1 + math.exp(0.25))
    assert grad[:, 0].tolist() == pytest.approx([0, slope, -slope, 0, 0, 0, 0, 0], rel=1e-6)
    assert metrics["preference/margin"] == pytest.approx(0.25, rel=1e-6)
    assert metrics["preference/accuracy"] == pytest.approx(0.5)


def test_unscored_samples_are_in_no_pair() -> None:
    delta, a = torch.tensor([[0.5], [0.1], [9.0]]), torch.tensor([1.0, -1.0, 0.0])
    mask = torch.tensor([[True], [True], [False]])
    alone = run(Preference(), delta[:2], a[:2], torch.zeros(2, dtype=torch.int64))
    total, grad, metrics = run(Preference(), delta, a, torch.zeros(3, dtype=torch.int64), mask)
    torch.testing.assert_close(total, alone[0], **EXACT)
    torch.testing.assert_close(grad[:2], alone[1], **EXACT)
    assert grad[2] == 0
    assert metrics == pytest.approx(alone[2])
    single = run(Preference(), delta[:1], a[:1], torch.zeros(1, dtype=torch.int64))
    assert single[0] == 0
    assert single[1] == 0


def test_decisions_are_paired_one_by_one() -> None:
    """Two decisions: the mean of the losses of each; this is Diffusion-DPO on shared (t, noise)."""
    delta = torch.tensor([[0.3, -0.4], [0.1, 0.8]])
    total, grad, _ = run(Preference(beta=0.7), delta, torch.tensor([1.0, 0.0]), torch.tensor([3, 3]))
    columns = [run(Preference(beta=0.7), delta[:, j], torch.tensor([1.0, 0.0]), torch.tensor([3, 3])) for j in (0, 1)]
    torch.testing.assert_close(total, (columns[0][0] + columns[1][0]) / 2, **EXACT)
    torch.testing.assert_close(grad, torch.cat([c[1] / 2 for c in columns], dim=1), **EXACT)


@pytest.mark.parametrize("far", [-800.0, 800.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "alpha", "jensen_shannon"])
def test_rows_without_a_partner_leave_gradients_finite(far: float, divergence: Any) -> None:
    """exp(800) is infinite: the third sample is in no pair, and 0 times infinity would be NaN."""
    delta, a = torch.tensor([0.1, -0.1, far]), torch.tensor([1.0, -1.0, 0.0])
    total, grad, _ = run(Preference(divergence=divergence), delta, a, torch.zeros(3, dtype=torch.int64))
    assert total.isfinite()
    assert grad.isfinite().all()
    assert grad[2] == 0


TWO = st.tuples(st.floats(-3, 3), st.floats(-3, 3))


@given(TWO, st.floats(0.05, 3), st.floats(0, 0.4), st.sampled_from(["logistic", "squared"]))
def test_exchanging_winner_and_loser_exchanges_their_gradients(
    delta: tuple[float, float], beta: float, flip: float, loss: Any
) -> None:
    """The pair is antisymmetric: the two gradients have opposite signs."""
    objective, groups = Preference(beta=beta, flip=flip, loss=loss), torch.tensor([0, 0])
    total, grad, _ = run(objective, torch.tensor(delta), torch.tensor([1.0, 0.0]), groups)
    again, other, _ = run(objective, torch.tensor(delta).flip(0), torch.tensor([0.0, 1.0]), groups)
    torch.testing.assert_close(again, total, **EXACT)
    torch.testing.assert_close(other.flip(0), grad, **EXACT)
    torch.testing.assert_close(grad.sum(), torch.tensor(0.0, dtype=torch.float64), **EXACT)


@given(TWO, st.floats(0.1, 2))
def test_the_mean_of_the_robust_loss_is_the_loss_of_clean_labels(delta: tuple[float, float], beta: float) -> None:
    """(1 - e) L(right label) + e L(flipped label) = DPO's loss: unbiased under flips (2403.00409)."""
    groups, d = torch.tensor([0, 0]), torch.tensor(delta)
    right, wrong = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    flipping = Preference(beta=beta, flip=0.3)
    mean = 0.7 * run(flipping, d, right, groups)[0] + 0.3 * run(flipping, d, wrong, groups)[0]
    torch.testing.assert_close(mean, run(Preference(beta=beta), d, right, groups)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("alpha", "limit"), [(1e-6, "reverse_kl"), (1.0, "forward_kl")])
def test_alpha_divergence_lies_between_the_two_kls(alpha: float, limit: Any) -> None:
    delta, a, groups = torch.tensor([0.4, -0.3]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    found = run(Preference(divergence="alpha", alpha=alpha), delta, a, groups)
    expected = run(Preference(divergence=limit), delta, a, groups)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)  # alpha is 1e-6
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-9)


def test_squared_loss_has_no_gradient_at_its_margin() -> None:
    """IPO: no gradient at a difference of 1 / (2 beta), for every beta; the gradient of DPO never vanishes."""
    delta, a, groups = torch.tensor([2.0, -0.5]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    assert run(Preference(beta=0.2, loss="squared"), delta, a, groups)[1].abs().max() < 1e-12
    assert run(Preference(beta=0.2), delta, a, groups)[1].abs().max() > 0.01


def test_anchored_by_hand() -> None:
    """KL(q || p) of softmaxes over each group; its gradient is (p - q) / temperature over the number of groups."""
    delta = torch.tensor([0.3, -0.2, 0.5, 1.0, -1.0, 0.0]).double()
    a = torch.tensor([1.0, 0.0, -2.0, 0.5, 0.5, 2.0]).double()
    groups = torch.tensor([0, 1, 0, 1, 1, 0])
    leaf = delta.clone().requires_grad_()
    terms, mass = [], []
    for g in (0, 1):
        rows = groups == g
        log_p, log_q = (leaf[rows] / 0.5).log_softmax(0), (a[rows] / 2.0).log_softmax(0)
        terms.append((log_q.exp() * (log_q - log_p)).sum())
        mass.append(float(log_p.exp()[log_q.exp() > 1 / 3].sum()))
    expected = sum(terms) / 2
    assert isinstance(expected, Tensor)
    total, grad, metrics = run(AnchoredPreference(0.5, 2.0), delta, a, groups)
    torch.testing.assert_close(total, expected.detach(), **EXACT)
    torch.testing.assert_close(grad[:, 0], torch.autograd.grad(expected, leaf)[0], **EXACT)
    assert metrics["preference/kl"] == pytest.approx(float(expected.detach()))
    assert metrics["preference/accuracy"] == pytest.approx(sum(mass) / 2)
    assert 0.1 < sum(mass) / 2 < 0.9


@pytest.mark.parametrize("size", range(2, 17))
def test_no_sample_is_above_average_among_equal_advantages(size: int) -> None:
    """exp(-log 7) * 7 is above 1 by rounding."""
    delta = torch.linspace(-1, 1, size)
    for a in (torch.zeros(size), torch.full((size,), 3.7)):
        _, _, metrics = run(AnchoredPreference(), delta, a, torch.zeros(size, dtype=torch.int64))
        assert metrics["preference/accuracy"] == 0.0


@given(TWO, st.floats(0.1, 2), st.floats(-3, 3))
def test_anchored_pair_is_dpo_with_soft_labels(delta: tuple[float, float], temperature: float, gap: float) -> None:
    """Its gradient is that of -s log sigmoid(h) - (1 - s) log sigmoid(-h), h = difference / temperature, s = sigmoid(gap)."""
    d, groups = torch.tensor(delta).double(), torch.tensor([0, 0])
    _, grad, _ = run(AnchoredPreference(temperature), d, torch.tensor([gap, 0.0]), groups)
    leaf = d.clone().requires_grad_()
    h, s = (leaf[0] - leaf[1]) / temperature, torch.tensor(gap).double().sigmoid()
    soft = -s * h.sigmoid().log() - (1 - s) * (-h).sigmoid().log()
    # sigmoids near 0 lose some digits in their logarithm
    torch.testing.assert_close(grad[:, 0], torch.autograd.grad(soft, leaf)[0], rtol=1e-6, atol=1e-9)


def test_anchored_pair_with_hard_labels_is_dpo() -> None:
    delta, a, groups = torch.tensor([0.4, -0.3]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    hard = run(AnchoredPreference(1 / 0.7, 1e-3), delta, a, groups)
    plain = run(Preference(beta=0.7), delta, a, groups)
    torch.testing.assert_close(hard[0], plain[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(hard[1], plain[1], rtol=1e-6, atol=1e-9)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"flip 0\.5"):
        Preference(flip=0.5)
    with pytest.raises(ValueError, match="loss is 'hinge'"):
        Preference(loss="hinge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target_temperature 0"):
        AnchoredPreference(target_temperature=0.0)
