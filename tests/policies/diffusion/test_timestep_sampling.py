"""Times of forward decisions: those of a grid, and densities that agree with the drawn times."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from difrl.config import GridTimes, LogitNormalTimes, UniformTimes
from difrl.policies.diffusion.timestep_sampling import build_density, build_quantile, stratified
from samplers import Grid


@pytest.mark.parametrize(
    ("steps", "fraction", "last"),
    [
        (14, 0.9, 11),  # AWM's own: floor(12.6) = 12, and so steps 1 .. 11
        (10, 0.9, 8),
        (10, 1.0, 9),
        (100, 0.29, 28),  # 0.29 * 100 is 28.999999999999996 in floats
        (10, 0.05, 1),
        (2, 1.0, 1),
    ],
)
def test_a_fraction_of_a_grid(steps: int, fraction: float, last: int) -> None:
    grid = Grid(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    u = stratified(torch.rand(1, 50 * steps, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    drawn = build_quantile(GridTimes(fraction=fraction))(u, grid)
    found, counts = drawn.unique(return_counts=True)
    assert torch.equal(found, grid.times[1 : last + 1].flip(0))  # the very times, in float64
    assert int(counts.max() - counts.min()) <= 2  # strata at the border of two times


def test_strata_by_hand() -> None:
    u = torch.tensor([[0.0, 0.5, 0.75, 0.25]])
    assert stratified(u).tolist() == [[0.0, 0.375, 0.6875, 0.8125]]


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.3, 1.3, 3.0), (-0.5, 0.7, 0.5)])
def test_a_shifted_logit_normal(mean: float, std: float, shift: float) -> None:
    """logit t = logit tau + log shift: t is logit-normal with mean + log shift."""
    times = LogitNormalTimes(kind="logit_normal", mean=mean, std=std, shift=shift)
    u = np.linspace(0.01, 0.99, 25)
    t = scipy.special.expit(scipy.stats.norm.ppf(u, mean + np.log(shift), std))
    density = scipy.stats.norm.pdf(scipy.special.logit(t), mean + np.log(shift), std) / (t * (1 - t))
    found = build_quantile(times)(torch.from_numpy(u), Grid(torch.tensor([1.0, 0.0])))
    np.testing.assert_allclose(found.numpy(), t, rtol=1e-12)
    # torch's Normal holds mean and std in float32
    np.testing.assert_allclose(build_density(times)(torch.from_numpy(t)).numpy(), density, rtol=1e-6)


def test_uniform_times_by_hand() -> None:
    times, grid = UniformTimes(kind="uniform", low=0.2, high=0.7), Grid(torch.tensor([1.0, 0.0]))
    assert build_quantile(times)(torch.tensor([[0.0, 0.5]]), grid).tolist() == [[0.2, pytest.approx(0.45)]]
    assert build_density(times)(torch.tensor([0.3, 0.6], dtype=torch.float64)).tolist() == pytest.approx([2.0, 2.0])
