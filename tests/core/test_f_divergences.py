"""f-divergences: by hand, against scipy and explicit sums, and by the means of their estimators and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from torch import Tensor

from difrl.core import F_DIVERGENCES, alpha_divergence, f_divergence, k2, k3

EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64, a few operations an element
NAMES = sorted(F_DIVERGENCES)

GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda u: u * u.log(),
    "forward_kl": lambda u: -u.log(),
    "jensen_shannon": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "alpha": lambda u: (u**0.5 - 0.5 * u - 0.5) / (0.5 * (0.5 - 1)),
    "hellinger": lambda u: (u.sqrt() - 1) ** 2 / 2,
    "total_variation": lambda u: (u - 1).abs() / 2,
    "chi_squared": lambda u: (u - 1) ** 2,
}
"""f(u) as in textbooks, where f'(1) need not be 0."""


def distributions(seed: int, size: int = 5, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Return logits of theta, with gradient, and log-probabilities of the reference."""
    g = torch.Generator().manual_seed(seed)
    logits, ref = spread * torch.randn(2, size, generator=g, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(0)


def brute(name: str, logits: Tensor, ref: Tensor) -> Tensor:
    p, q = logits.softmax(0), ref.exp()
    return sum((q[v] * GENERATORS[name](p[v] / q[v]) for v in range(len(q))), torch.zeros((), dtype=torch.float64))


def gradient(scalar: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(scalar, logits, retain_graph=True)[0]


def test_two_elements_by_hand() -> None:
    """theta = (3/4, 1/4), ref = (1/2, 1/2): u = (3/2, 1/2)."""
    p, q = torch.tensor([0.75, 0.25]).double().log(), torch.tensor([0.5, 0.5]).double().log()
    expected = {
        "reverse_kl": 0.75 * math.log(3) - math.log(2),
        "forward_kl": math.log(2) - 0.5 * math.log(3),
        "jensen_shannon": 0.75 * math.log(6 / 5)
        + 0.25 * math.log(2 / 3)
        + 0.5 * math.log(4 / 5)
        + 0.5 * math.log(4 / 3),
        "alpha": 4 - 2 * math.sqrt(1.5) - 2 * math.sqrt(0.5),
        "hellinger": 1 - math.sqrt(0.375) - math.sqrt(0.125),
        "total_variation": 0.25,
        "chi_squared": 0.25,
    }
    for name, value in expected.items():
        assert f_divergence(name).full(p, q).item() == pytest.approx(value, rel=1e-12), name


def test_against_scipy() -> None:
    logits, ref = distributions(0)
    p, q = logits.detach().softmax(0).numpy(), ref.exp().numpy()
    found = {name: f_divergence(name).full(logits.detach().log_softmax(0), ref).item() for name in NAMES}
    assert found["reverse_kl"] == pytest.approx(rel_entr(p, q).sum(), rel=1e-12)
    assert found["forward_kl"] == pytest.approx(rel_entr(q, p).sum(), rel=1e-12)
    assert found["jensen_shannon"] == pytest.approx(2 * jensenshannon(p, q) ** 2, rel=1e-12)
    assert found["hellinger"] == pytest.approx(np.linalg.norm(np.sqrt(p) - np.sqrt(q)) ** 2 / 2, rel=1e-12)
    assert found["total_variation"] == pytest.approx(np.abs(p - q).sum() / 2, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 4.0]))
@settings(max_examples=25)
def test_full_is_the_sum_over_elements_and_so_is_its_gradient(name: str, seed: int, spread: float) -> None:
    logits, ref = distributions(seed, spread=spread)
    found, expected = f_divergence(name).full(logits.log_softmax(0), ref), brute(name, logits, ref)
    # Textbook forms cancel terms of size 1, ours do not: they lose 1e-13.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(gradient(found, logits), gradient(expected, logits), rtol=1e-9, atol=1e-13)
    assert found >= 0


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_means_of_estimators_and_of_their_gradients(name: str, seed: int) -> None:
    """By enumeration: the mean over elements of theta, or of the reference, with the sampling held fixed."""
    logits, ref = distributions(seed)
    divergence, logp = f_divergence(name), logits.log_softmax(0)
    exact, delta = divergence.full(logp, ref), logp - ref
    for weights, values in (
        (logp.detach().exp(), divergence.estimate_from_policy_samples(delta)),
        (ref.exp(), divergence.estimate_from_reference_samples(delta)),
    ):
        mean = (weights * values).sum()
        torch.testing.assert_close(mean, exact, **EXACT)
        torch.testing.assert_close(gradient(mean, logits), gradient(exact, logits), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "alpha"), [*((name, 0.3) for name in NAMES), ("alpha", -0.5), ("alpha", 1.5)], ids=str
)
def test_generator_perspective_slope_and_limits_are_consistent(name: str, alpha: float) -> None:
    divergence = f_divergence(name, alpha)
    delta = torch.linspace(-4, 4, 40, dtype=torch.float64, requires_grad=True)  # without 0, where TV has no slope
    f, u = divergence.generator(delta), delta.exp()
    torch.testing.assert_close(divergence.perspective(delta), f / u, **EXACT)
    torch.testing.assert_close(gradient(f.sum(), delta), divergence.slope(delta) * u, **EXACT)
    here = torch.zeros(1, dtype=torch.float64)
    assert divergence.generator(here).item() == divergence.slope(here).item() == 0.0
    far = torch.tensor([-500.0, 500.0], dtype=torch.float64)  # u^(3/10) of the slowest is 1e-65 there
    for limit, value in (
        (divergence.at_zero, divergence.generator(far[0])),
        (divergence.at_infinity, divergence.perspective(far[1])),
    ):
        assert value == pytest.approx(limit, rel=1e-9) if math.isfinite(limit) else value > 100


def test_k2_and_k3_are_estimators_of_the_family() -> None:
    """On samples of theta k2 has the gradient of reverse KL, and k3 the value of reverse KL and the gradient of forward KL."""
    delta = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(delta)
    reverse, forward = (f_divergence(name).estimate_from_policy_samples(delta) for name in ("reverse_kl", "forward_kl"))
    torch.testing.assert_close(reverse, k3(delta, zero), **EXACT)
    torch.testing.assert_close(gradient(reverse.sum(), delta), gradient(k2(delta, zero).sum(), delta), **EXACT)
    torch.testing.assert_close(gradient(forward.sum(), delta), gradient(k3(delta, zero).sum(), delta), **EXACT)


@pytest.mark.parametrize(
    ("alpha", "name", "factor"),
    [(0.0, "reverse_kl", 1.0), (1.0, "forward_kl", 1.0), (0.5, "hellinger", 4.0), (-1.0, "chi_squared", 0.5)],
)
def test_alpha_contains_other_divergences(alpha: float, name: str, factor: float) -> None:
    logits, ref = distributions(3)
    logp = logits.detach().log_softmax(0)
    other = f_divergence(name).full(logp, ref)
    torch.testing.assert_close(alpha_divergence(alpha).full(logp, ref), factor * other, **EXACT)
    close = alpha_divergence(alpha + 1e-5).full(logp, ref)
    torch.testing.assert_close(close, factor * other, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_elements_of_probability_0(name: str) -> None:
    """They cost the limits of f at 0 and of f(u) / u at infinity; where both probabilities are 0 there is no term and no NaN."""
    divergence = f_divergence(name)
    logits = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]], dtype=torch.float64, requires_grad=True)
    same = divergence.full(logits.log_softmax(1), logits.detach().log_softmax(1))
    assert same.tolist() == [0.0]
    assert gradient(same.sum(), logits).tolist() == [[0.0] * 4]
    half, quarter = logits.detach().log_softmax(1), torch.zeros(1, 4, dtype=torch.float64).log_softmax(1)
    dropped, added = divergence.full(half, quarter).item(), divergence.full(quarter, half).item()
    two = torch.tensor([2.0], dtype=torch.float64).log()
    kept = 0.5 * divergence.generator(two).item(), 0.5 * divergence.perspective(-two).item()
    assert dropped == pytest.approx(kept[0] + 0.5 * divergence.at_zero)
    assert added == pytest.approx(kept[1] + 0.5 * divergence.at_infinity)
    lost = divergence.full(logits.log_softmax(1), quarter)
    if math.isfinite(dropped):
        assert gradient(lost.sum(), logits).isfinite().all()


def test_ratios_beyond_float32_do_not_overflow() -> None:
    """exp of log-ratios of +-200 overflows or underflows, but every term is computed on the side where it does not."""
    logits = torch.tensor([[0.0, -200.0]], requires_grad=True)
    ref = torch.tensor([[-200.0, 0.0]]).log_softmax(1)
    finite = {"reverse_kl": 200.0, "forward_kl": 200.0, "jensen_shannon": 2 * math.log(2), "alpha": 4.0}
    finite |= {"hellinger": 1.0, "total_variation": 1.0}
    for name, value in finite.items():
        found = f_divergence(name).full(logits.log_softmax(1), ref)
        assert found.item() == pytest.approx(value, rel=1e-5), name
        assert gradient(found.sum(), logits).isfinite().all(), name


def test_dtypes_shapes_and_refusals() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).bfloat16().log_softmax(-1)
    found = f_divergence("jensen_shannon").full(logits, logits.roll(1, 0))
    assert (found.shape, found.dtype) == ((2, 3), torch.float32)
    with pytest.raises(ValueError, match=r"log_p has shape \[2, 3, 7\] and log_q \[3, 7\]"):
        f_divergence("alpha").full(logits, logits[0])
    with pytest.raises(ValueError, match="no f-divergence 'kl'"):
        f_divergence("kl")
