from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samplers import FlowMatching, Process, VariancePreserving, corrupt, expand

PREDICTIONS = ("epsilon", "v_prediction", "sample")
# Stable Diffusion's own table.
SD_TABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
# Zero terminal SNR: the last entry is pure noise.
ZERO_TABLE = torch.linspace(1, 0, 101, dtype=torch.float64)[1:] ** 2

PROCESSES: dict[str, Process] = {
    "flow": FlowMatching(),
    **{name: VariancePreserving(SD_TABLE, name) for name in PREDICTIONS},
    "zero-snr": VariancePreserving(ZERO_TABLE, "v_prediction"),
}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
inside = st.floats(0.01, 0.99)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_flow_by_hand():
    process, t = FlowMatching(), double(0.25)
    x0, eps = double(1.0)[None], double(3.0)[None]
    x_t = corrupt(process, x0, eps, t)
    assert x_t.item() == 1.5  # 0.75 * 1 + 0.25 * 3
    assert process.target(x0, eps, t).item() == 2.0
    assert process.timestep(t).item() == 250.0
    assert process.log_snr_rate(t).item() == pytest.approx(2 / (0.25 * 0.75))
    x0_hat, eps_hat = process.split(double(2.0)[None], x_t, t)
    assert (x0_hat.item(), eps_hat.item()) == (1.0, 3.0)


@pytest.mark.parametrize(("prediction", "output"), [("epsilon", 3.0), ("sample", 1.0), ("v_prediction", 1.8 - 0.8)])
def test_variance_preserving_by_hand(prediction, output):
    process = VariancePreserving(torch.tensor([0.64, 0.36], dtype=torch.float64), prediction)
    t = double(1.0)  # alpha 0.6, sigma 0.8
    x0, eps = double(1.0)[None], double(3.0)[None]
    x_t = corrupt(process, x0, eps, t)
    assert x_t.item() == pytest.approx(3.0)  # 0.6 + 2.4
    assert process.target(x0, eps, t).item() == pytest.approx(output)
    assert process.timestep(t).item() == 1.0
    x0_hat, eps_hat = process.split(double(output)[None], x_t, t)
    assert (x0_hat.item(), eps_hat.item()) == (pytest.approx(1.0), pytest.approx(3.0))


def test_variance_preserving_is_exact_on_its_table():
    process = VariancePreserving(SD_TABLE, "epsilon")
    index = torch.arange(1000)
    for t in ((index + 1).double() / 1000, (index + 1).float() / 1000):  # also when t is only float32
        torch.testing.assert_close(process.alpha(t), SD_TABLE.sqrt(), rtol=0, atol=1e-15)
        torch.testing.assert_close(process.sigma(t), (1 - SD_TABLE).sqrt(), rtol=0, atol=1e-14)
        assert torch.equal(process.timestep(t), index.double())
    clean = torch.zeros(())
    assert (process.alpha(clean).item(), process.sigma(clean).item()) == (1.0, 0.0)
    assert process.timestep(clean).item() == 0.0  # no model accepts a timestep of -1


def test_the_angle_is_linear_between_points():
    """For alphas_cumprod 0.64 and 0.36 the angles are 0, arcsin 0.6 and arcsin 0.8 at t = 0, 1/2 and 1."""
    process = VariancePreserving(torch.tensor([0.64, 0.36], dtype=torch.float64), "epsilon")
    one, two = math.asin(0.6), math.asin(0.8)
    for t, angle, slope in ((0.25, one / 2, 2 * one), (0.75, (one + two) / 2, 2 * (two - one))):
        assert process.alpha(double(t)).item() == pytest.approx(math.cos(angle))
        assert process.sigma(double(t)).item() == pytest.approx(math.sin(angle))
        assert process.log_snr_rate(double(t)).item() == pytest.approx(2 * slope / (math.sin(angle) * math.cos(angle)))


def test_the_angle_interpolates_the_log_snr_to_second_order():
    process = VariancePreserving(SD_TABLE, "epsilon")
    log_snr = (SD_TABLE / (1 - SD_TABLE)).log()
    middle = (log_snr[100:-1] + log_snr[101:]) / 2
    t = (torch.arange(100, 999) + 1.5) / 1000
    found = 2 * (process.alpha(t) / process.sigma(t)).log()
    torch.testing.assert_close(found, middle, rtol=0, atol=1e-4)  # a step of the table is 0.01 to 0.02


@each_process
@settings(max_examples=25)
@given(t=st.lists(inside, min_size=3, max_size=3), seed=st.integers(0, 2**31))
def test_round_trips(process, t, seed):
    t = double(*t)
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 3, 4, 2, generator=generator, dtype=torch.float64)
    x_t = corrupt(process, x0, eps, t)
    output = process.target(x0, eps, t)
    x0_hat, eps_hat = process.split(output, x_t, t)
    # 1/alpha and 1/sigma are at most 1e3 or so on these times; float64 leaves 1e-12.
    torch.testing.assert_close(x0_hat, x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(eps_hat, eps, rtol=0, atol=1e-11)
    torch.testing.assert_close(process.combine(x0_hat, eps_hat, t), output, rtol=0, atol=1e-11)
    torch.testing.assert_close(process.time(process.timestep(t)).clamp(min=0), t, rtol=0, atol=2e-7)


@each_process
@settings(max_examples=25)
@given(t=inside)
def test_log_snr_rate_is_the_derivative(process, t):
    # Off the table's points, where the slope of the interpolation jumps.
    t = (torch.tensor(t, dtype=torch.float64) * 100).floor() / 100 + 0.00037
    t.requires_grad_()
    log_snr = (process.alpha(t) ** 2 / process.sigma(t) ** 2).log()
    (slope,) = torch.autograd.grad(log_snr, t)
    assert process.log_snr_rate(t.detach()).item() == pytest.approx(-slope.item(), rel=1e-9)
    assert slope < 0


@each_process
def test_coefficients_are_a_corruption(process):
    t = torch.linspace(0, 1, 57, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    total = alpha + sigma if process.prediction == "flow_prediction" else alpha**2 + sigma**2
    torch.testing.assert_close(total, torch.ones_like(total))


@each_process
def test_half_precision_is_raised_and_double_kept(process):
    t = torch.tensor([0.3, 0.8])
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64,) * 2,
    ):
        x, y = torch.ones(2, 3, dtype=dtype), torch.full((2, 3), 0.5, dtype=dtype)
        found = [
            *process.split(y, x, t),
            process.target(x, y, t),
            process.combine(x, y, t),
            corrupt(process, x, y, t),
        ]
        assert {tensor.dtype for tensor in found} == {expected}


def test_expand_takes_one_time_or_one_a_sample():
    x = torch.zeros(2, 3, 4)
    assert expand(torch.tensor(0.5), x).shape == (2, 1, 1)
    assert expand(torch.tensor([0.5, 0.2]), x).flatten().tolist() == pytest.approx([0.5, 0.2])


@pytest.mark.parametrize("table", [[0.5, 0.9], [0.5, 0.5], [1.0, 0.5], [0.5, -0.1], [], [[0.5]]])
def test_a_bad_table_is_refused(table):
    with pytest.raises(ValueError, match="alphas_cumprod must be"):
        VariancePreserving(torch.tensor(table), "epsilon")


def test_bad_predictions_are_refused():
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        VariancePreserving(SD_TABLE, "velocity")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        VariancePreserving(ZERO_TABLE, "epsilon")
