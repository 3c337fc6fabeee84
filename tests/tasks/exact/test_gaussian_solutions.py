"""The closed forms, against numbers worked by hand and against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime

from benchmarks.arenas import gaussian_answers as answers
from difrl.tasks.exact.gaussian_forward import MatchingLoss, Setup, fixed_point
from difrl.tasks.exact.gaussian_solutions import Chain, Normal, build_exact_denoiser, constant_mean, probe_chain
from samplers import FlowMatching, Grid, Window, make_kernel, ode, transition_std

PROCESS = FlowMatching()
DATA = Normal(np.array([0.5, -0.3, 0.2]), np.array([[0.8, 0.3, 0.0], [0.3, 1.2, -0.2], [0.0, -0.2, 0.6]]))
DIRECTION = np.array([-0.3, 0.7, 0.5])
GRID = Grid(torch.linspace(1, 0, 13))
BASE = build_exact_denoiser(PROCESS, DATA.cov, constant_mean(DATA.mean))


def chain(kernel: str, noise_level: float, grid: Grid = GRID) -> Chain:
    made = make_kernel(kernel, noise_level, grid)
    window = Window.noisy(transition_std(made, PROCESS, grid))
    return probe_chain(BASE, PROCESS, grid, made, window, 3)


def test_kl_and_tilt_by_hand() -> None:
    one = Normal(np.array([0.0]), np.array([[2.0]]))
    tilted = one.tilted(np.array([3.0]), 2.0)
    assert tilted.mean == pytest.approx(3.0)  # Σ a / β = 2 · 3 / 2
    assert tilted.kl(one) == pytest.approx(9 / 4)  # |shift|² / (2 Σ)
    other = Normal(np.array([0.0]), np.array([[1.0]]))
    assert one.kl(other) == pytest.approx((2 - 1 - np.log(2)) / 2)


def test_the_chain_optimum_maximises_reward_minus_path_kl() -> None:
    """Among constant shifts and feedback gains of every step the best has no feedback."""
    base, beta = chain("dance_sde", 0.7), 0.8
    noisy = base.stds > 0

    def value(parameters: np.ndarray) -> float:
        shifts = np.zeros_like(base.offsets)
        gains = np.zeros_like(base.matrices)
        shifts[noisy] = parameters[: 3 * noisy.sum()].reshape(-1, 3)
        gains[noisy] = parameters[3 * noisy.sum() :].reshape(-1, 3, 3)
        mean, cov, cost = np.zeros(3), np.eye(3), 0.0
        for j, std in enumerate(base.stds):
            move = shifts[j] + gains[j] @ mean
            if std > 0:
                cost += (move @ move + np.trace(gains[j] @ cov @ gains[j].T)) / (2 * std**2)
            matrix = base.matrices[j] + gains[j]
            mean, cov = matrix @ mean + base.offsets[j] + shifts[j], matrix @ cov @ matrix.T + std**2 * np.eye(3)
        return float(beta * cost - DIRECTION @ mean)

    optimum = base.with_control(DIRECTION, np.full(12, 1 / beta))
    ours = np.concatenate([(optimum.offsets - base.offsets)[noisy].reshape(-1), np.zeros(9 * noisy.sum())])
    slope = approx_fprime(ours, value, 1e-6)
    assert (
        np.abs(slope).max() < 1e-4
    )  # forward differences err by their step times a curvature of at most 1 / std² = 1e2
    random = np.random.default_rng(0).normal(size=(20, len(ours))) * 1e-2
    assert min(value(ours + step) for step in random) > value(ours)


@pytest.mark.parametrize(("kernel", "noise_level"), [("flow_sde", 2**0.5), ("ddim", 1.0), ("precise", 2**0.5)])
def test_a_memoryless_chain_ends_at_the_optimum(kernel: str, noise_level: float) -> None:
    """The optimum over chains is the tilt of the chain's own end, which tends to the data with more steps."""
    target = DATA.tilted(DIRECTION, 1.0)
    distances = []
    for steps in (12, 48):
        base = chain(kernel, noise_level, Grid(torch.linspace(1, 0, steps + 1)))
        assert base.initial_variance_share() < 1e-3
        end = base.with_control(DIRECTION, np.ones(steps)).end()
        assert end.kl(base.end().tilted(DIRECTION, 1.0)) < 1e-4
        distances.append(end.kl(target))
    assert distances[1] < 0.02
    assert distances[1] < distances[0] / 8  # KL is quadratic in an error of O(1/N): about 1/16


@pytest.mark.parametrize(("kernel", "noise_level", "kept"), [("dance_sde", 0.7, 0.4), ("flow_sde", 0.7, 0.08)])
def test_other_noise_keeps_what_the_chain_remembers(kernel: str, noise_level: float, kept: float) -> None:
    base = chain(kernel, noise_level)
    shift = base.with_control(DIRECTION, np.ones(12)).end().mean - base.end().mean
    full = base.end().cov @ DIRECTION
    assert base.initial_variance_share() == pytest.approx(kept, abs=0.05)
    assert DIRECTION @ shift < (1 - kept / 3) * (DIRECTION @ full)


def build_setup() -> Setup:
    return Setup(
        PROCESS,
        DATA,
        DIRECTION,
        GRID.times[:-1].flip(0).numpy(),
        lambda output: probe_chain(output, PROCESS, GRID, ode, Window(0, 0), 3).end(),
    )


@pytest.mark.parametrize("weight", [lambda t: np.ones_like(t), answers.elbo_weight], ids=["uniform", "elbo"])
def test_equal_weights_of_likelihood_and_anchor_give_the_tilt(weight) -> None:
    setup, t = build_setup(), answers.TIMES
    matching = MatchingLoss(answers.constant_slope(weight), 2 * weight(t) + 1e-9, t, np.full(len(t), 1 / len(t)))
    means, base = fixed_point(matching, setup), setup.sample(BASE)
    expected = DATA.mean + base.cov @ DIRECTION / 2
    # Expectations over 2048 Sobol points in six dimensions are good to about 1e-3.
    np.testing.assert_allclose(means, np.broadcast_to(expected, means.shape), atol=3e-3)


def test_monte_carlo_finds_a_gradient_of_zero() -> None:
    """The fixed point of `ghuber` agrees with torch's gradient of the loss on new samples."""
    setup, t = build_setup(), answers.TIMES
    matching = MatchingLoss(answers.ghuber_slope, np.ones_like(t), t, np.full(len(t), 1 / len(t)))
    table = torch.tensor(fixed_point(matching, setup), requires_grad=True)
    end, generator = setup.end(table.detach().numpy()), np.random.default_rng(0)
    count = 40_000
    x0 = torch.from_numpy(generator.multivariate_normal(end.mean, end.cov, count))
    times, eps = torch.from_numpy(generator.random(count)), torch.from_numpy(generator.normal(size=(count, 3)))
    hats = np.stack([np.interp(times.numpy(), setup.rows, row) for row in np.eye(len(setup.rows))], axis=1)
    output = build_exact_denoiser(PROCESS, DATA.cov, lambda at: torch.from_numpy(hats) @ table)
    x_t = (1 - times[:, None]) * x0 + times[:, None] * eps
    found, base = output(x_t, times), BASE(x_t, times)
    m = (found - (eps - x0)).square().mean(1)
    advantage = (x0 - torch.from_numpy(end.mean)) @ torch.from_numpy(DIRECTION)
    loss = advantage * 4 * times * (m + 1e-10) ** 0.25 + (found - base).square().mean(1)
    gradients = torch.autograd.grad(loss.mean(), table)[0]
    at_base = table.detach() * 0 + torch.from_numpy(DATA.mean)
    table.data.copy_(at_base)
    found, m = output(x_t, times), (output(x_t, times) - (eps - x0)).square().mean(1)
    scale = torch.autograd.grad((advantage * 4 * times * (m + 1e-10) ** 0.25).mean(), table)[0]
    # Noise of 40,000 samples is about 1/200 of a term's own size.
    assert gradients.norm() < 0.05 * scale.norm()
