"""Final distribution of each sampler on Gaussian data with the exact denoiser; moments are propagated exactly."""

from __future__ import annotations

import math

import pytest
import torch

from samplers import FlowMatching, Grid, VariancePreserving, make_kernel, reinforcement_learning

FLOW = FlowMatching()
# A cosine-like table that is pure noise at t = 1, so that N(0, I) is the exact start.
COSINE = VariancePreserving(torch.linspace(0, math.pi / 2, 2001, dtype=torch.float64)[1:].cos() ** 2, "sample")


def distance(process, name, noise_level, steps, build_task, propagate, cov_factor=1.0):
    """Return the largest error of the mean, and of the covariance against `cov_factor` times that of the data."""
    grid = Grid(torch.linspace(1, 0, steps + 1))
    data = build_task(process)
    kernel = make_kernel(name, noise_level, grid)
    start = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    mean, cov = propagate(data.denoiser, process, kernel, grid, *start)
    return (mean - data.mean).abs().max().item(), (cov - cov_factor * data.cov).abs().max().item()


@pytest.mark.parametrize(
    ("process", "name", "noise_level"),
    [
        (FLOW, "ode", 0.0),
        (FLOW, "ddim", 0.5),
        (FLOW, "ddim", 1.0),
        (FLOW, "precise", 0.7),
        (FLOW, "precise", math.sqrt(2)),
        (FLOW, "dance_sde", 0.5),
        (COSINE, "ode", 0.0),
        (COSINE, "ddim", 1.0),
        (COSINE, "precise", 0.7),
    ],
)
def test_samplers_end_at_the_data(process, name, noise_level, build_task, propagate):
    coarse = distance(process, name, noise_level, 100, build_task, propagate)
    fine = distance(process, name, noise_level, 400, build_task, propagate)
    # First-order samplers: an error of O(1/N), so about a quarter of it with four times the steps.
    assert max(fine) < 0.02
    assert fine[1] < 0.4 * coarse[1]


def test_flow_sde_ends_at_the_data_slowly(build_task, propagate):
    """At t = 1 its g^2 |dt| does not vanish with the step, so the error of the first steps decreases slowly."""
    coarse, fine = (distance(FLOW, "flow_sde", 0.7, steps, build_task, propagate) for steps in (200, 1600))
    assert max(fine) < 0.01
    # Eight times the steps: an error of O(1/N) would fall to an eighth, this one to about a half.
    assert 0.3 * coarse[1] < fine[1] < 0.8 * coarse[1]


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_cps_loses_variance_by_design(noise_level, build_task, propagate):
    factor = (1 + math.cos(noise_level * math.pi / 2)) / 2
    coarse = distance(FLOW, "cps", noise_level, 100, build_task, propagate, factor)
    fine = distance(FLOW, "cps", noise_level, 400, build_task, propagate, factor)
    assert max(fine) < 0.02
    assert fine[1] < 0.4 * coarse[1]


@pytest.mark.parametrize("process", [FLOW, COSINE], ids=["flow", "vp"])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0])
def test_rlg_of_two_gaussians_is_the_gaussian_at_the_weighted_mean(process, weight, build_task, propagate):
    """Base N(0, I) and optimum N(a/beta, I): RLG at w samples N(w a/beta, I), with exactly its velocity."""
    eye, tilt = torch.eye(2, dtype=torch.float64), torch.tensor([2.0, -1.0], dtype=torch.float64)
    tasks = [type(build_task(process))(process, scale * tilt, eye) for scale in (0.0, 1.0, weight)]
    base, tuned, target = (each.denoiser for each in tasks)
    guided = reinforcement_learning(base, tuned, weight)
    grid = Grid(torch.linspace(1, 0, 51))
    for name, noise_level in (("ode", 0.0), ("ddim", 1.0)):
        run = (process, make_kernel(name, noise_level, grid), grid, torch.zeros(2).double(), eye)
        mean, cov = propagate(guided, *run)
        torch.testing.assert_close((mean, cov), propagate(target, *run), rtol=0, atol=1e-10)
        torch.testing.assert_close(mean, weight * tilt, rtol=0, atol=1e-6)
        torch.testing.assert_close(cov, eye, rtol=0, atol=0.12)  # 50 first-order steps


@pytest.mark.parametrize("first_steps", [0, 20, 50])
def test_rlg_after_first_steps_moves_by_the_rest_of_the_path(first_steps, build_task, propagate):
    """The mean of a run is linear in each step's weight: w = 1 up to the switch, then w from the state there."""
    eye, tilt = torch.eye(2, dtype=torch.float64), torch.tensor([2.0, -1.0], dtype=torch.float64)
    base, tuned = (type(build_task(FLOW))(FLOW, scale * tilt, eye).denoiser for scale in (0.0, 1.0))
    grid = Grid(torch.linspace(1, 0, 51))
    guided = reinforcement_learning(base, tuned, 3.0, first_steps=first_steps, grid=grid)
    run = (FLOW, make_kernel("ode", 0.0, grid), grid)
    mean, _ = propagate(guided, *run, torch.zeros(2).double(), eye)
    weights = [1.0 if step < first_steps else 3.0 for step in range(50)]
    expected = torch.zeros(2, dtype=torch.float64)
    for t, s, weight in zip(grid.times[:-1], grid.times[1:], weights, strict=True):
        spread = (1 - t) ** 2 + t**2
        gain = (1 - t) / spread
        x0_hat = weight * tilt + gain * (expected - (1 - t) * weight * tilt)
        expected = expected + (s - t) * (expected - x0_hat) / t
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)
