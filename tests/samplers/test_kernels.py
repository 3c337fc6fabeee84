from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import (
    KERNELS,
    FlowMatching,
    Gaussian,
    Grid,
    VariancePreserving,
    cps,
    dance_sde,
    ddim,
    flow_sde,
    make_kernel,
    ode,
    precise,
    transition_std,
)

FLOW = FlowMatching()
UNIFORM = Grid(torch.linspace(1, 0, 11))


def moments_at(kernel, **options):
    """Return mean and std of a kernel moments_at t = 0.5, s = 0.4, x = 2, v = 2, where x0_hat = 1 and eps_hat = 3."""
    t, s = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    two = torch.full((1, 1), 2.0, dtype=torch.float64)
    mean, std = kernel(FLOW, two, two, t, s, **options)
    return mean.item(), std.item()


def test_kernels_by_hand():
    assert moments_at(ode) == pytest.approx((1.8, 0.0))  # 0.6 * 1 + 0.4 * 3 = 2 - 0.1 * 2
    # rho = (0.4 * 0.5) / (0.5 * 0.6) = 2/3; 0.4 sqrt(1 - 4/9); sqrt(0.16 - 0.0888...) = 0.2666...
    assert moments_at(ddim, noise_level=1.0) == pytest.approx((0.6 + 0.8, 0.4 * math.sqrt(5) / 3))
    # 0.4 sin(45 deg), and as much of the old noise
    assert moments_at(cps, noise_level=0.5) == pytest.approx((0.6 + 3 * 0.4 / math.sqrt(2), 0.4 / math.sqrt(2)))
    # 0.4 sqrt(1 - 2/3); sqrt(0.16 * 2/3)
    assert moments_at(precise, noise_level=1.0) == pytest.approx((0.6 + 3 * 0.4 * math.sqrt(2 / 3), 0.4 / math.sqrt(3)))
    # g = 1, score = -3/0.5 = -6: 2 + (2 + 3) * -0.1
    assert moments_at(flow_sde, noise_level=1.0, t_cap=0.9) == pytest.approx((1.5, math.sqrt(0.1)))
    # g = 1/2: 2 + (2 + 0.75) * -0.1
    assert moments_at(dance_sde, noise_level=0.5) == pytest.approx((1.725, 0.5 * math.sqrt(0.1)))


def test_flow_sde_at_time_one_uses_the_second_time_of_the_grid():
    stds = transition_std(make_kernel("flow_sde", 0.7, UNIFORM), FLOW, UNIFORM)
    assert stds[0].item() == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.9)) * math.sqrt(0.1))
    assert stds[1].item() == pytest.approx(0.7 * math.sqrt(0.9 / 0.1) * math.sqrt(0.1))


@settings(max_examples=50)
@given(t=st.floats(0.02, 1), fraction=st.floats(0, 0.99), eta=st.floats(0, 1))
def test_identities_between_kernels(t, fraction, eta):
    t, s = torch.tensor([t], dtype=torch.float64), torch.tensor([t * fraction], dtype=torch.float64)
    x, v = torch.randn(2, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_same(precise(FLOW, v, x, t, s, noise_level=math.sqrt(2)), ddim(FLOW, v, x, t, s, noise_level=1.0))
    euler = Gaussian(x + (s - t) * v, torch.zeros(1, 1, dtype=torch.float64))
    assert_same(ode(FLOW, v, x, t, s), euler)
    for kernel in (ddim, cps, precise, dance_sde):
        assert_same(kernel(FLOW, v, x, t, s, noise_level=0.0), euler)
    assert_same(flow_sde(FLOW, v, x, t, s, noise_level=0.0, t_cap=0.9), euler)
    # Kept and fresh noise make up the process's own, and rounding makes no NaN.
    for kernel in (ddim, cps, precise):
        mean, std = kernel(FLOW, v, x, t, s, noise_level=eta)
        assert mean.isfinite().all()
        assert 0 <= std.item() <= s.item() * (1 + 1e-12)


def assert_same(left: Gaussian, right: Gaussian) -> None:
    # sqrt(sigma^2 - std^2) makes 1e-8 of a rounding of 1e-16 where nearly nothing of the noise is kept.
    torch.testing.assert_close(left.mean, right.mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(left.std, right.std, rtol=0, atol=1e-7)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_log_prob_and_kl_are_those_of_torch_distributions(reduce):
    torch.manual_seed(0)
    mean, other, x = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    std = torch.rand(4, 1, 1, dtype=torch.float64) + 0.1
    theirs = torch.distributions.Normal(mean, std.expand_as(mean))
    their_other = torch.distributions.Normal(other, std.expand_as(mean))
    log_prob = theirs.log_prob(x).flatten(1)
    kl = torch.distributions.kl_divergence(theirs, their_other).flatten(1)
    torch.testing.assert_close(Gaussian(mean, std).log_prob(x, reduce), getattr(log_prob, reduce)(1))
    torch.testing.assert_close(Gaussian(mean, std).kl(Gaussian(other, std.clone()), reduce), getattr(kl, reduce)(1))


def test_gaussian_refuses_what_would_be_silently_wrong():
    gaussian = Gaussian(torch.zeros(2, 3), torch.ones(2, 1))
    with pytest.raises(ValueError, match="different std"):
        gaussian.kl(Gaussian(torch.zeros(2, 3), 2 * torch.ones(2, 1)))
    with pytest.raises(ValueError, match="give one shape"):
        gaussian.sample(torch.zeros(1, 3))
    with pytest.raises(ValueError, match='"mean" or "sum"'):
        gaussian.log_prob(torch.zeros(2, 3), "average")


def test_bf16_gives_float32_mathematics():
    """Half-precision inputs are raised once: the result is that of the same numbers in float32."""
    torch.manual_seed(0)
    x, v = torch.randn(2, 3, 4, 2, 2).bfloat16()
    t, s = torch.full((3,), 0.7), torch.full((3,), 0.6)
    for name in KERNELS:
        kernel = make_kernel(name, 0.0 if name == "ode" else 0.7, UNIFORM)
        half, single = kernel(FLOW, v, x, t, s), kernel(FLOW, v.float(), x.float(), t, s)
        assert half.mean.dtype == half.std.dtype == torch.float32
        assert torch.equal(half.mean, single.mean)
        assert half.std.shape == (3, 1, 1, 1)
        assert kernel(FLOW, v.double(), x.double(), t, s).mean.dtype == torch.float64


def model(process, x, t):
    """Return the raw output of a smooth denoiser, in the kind that the process predicts."""
    x0_hat = torch.tanh(2 * x + t[:, None, None].float()) + 0.3 * x.flip(-1)
    alpha, sigma = (value.float()[:, None, None] for value in (process.alpha(t), process.sigma(t)))
    return process.combine(x0_hat, (x - alpha * x0_hat) / sigma, t)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "spacing", [{"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}]
)
@pytest.mark.parametrize("to_clean", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_diffusers_ddim(prediction, spacing, to_clean, eta):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=to_clean,
        **spacing,
    )
    process = VariancePreserving(scheduler.alphas_cumprod, prediction)
    grid = Grid.from_scheduler(scheduler, process, 20)
    kernel = make_kernel("ddim", eta, grid)
    scheduler.set_timesteps(20)
    torch.manual_seed(0)
    ours = theirs = torch.randn(2, 3, 4)
    for step, timestep in enumerate(scheduler.timesteps):
        t, s = grid.times[step].expand(2), grid.times[step + 1].expand(2)
        assert process.timestep(t)[0].item() == timestep.item()
        noise = torch.randn(2, 3, 4)
        # Diffusers adds noise on the last step too if it does not end moments_at clean data; so does the bare kernel.
        ours = kernel(process, model(process, ours, t), ours, t, s).sample(noise)
        theirs = scheduler.step(model(process, theirs, t), timestep, theirs, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_flow_ode_is_diffusers_euler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    grid = Grid.from_scheduler(scheduler, FLOW, 10)
    scheduler.set_timesteps(10)
    torch.manual_seed(0)
    ours = theirs = torch.randn(2, 3, 4)
    for step, timestep in enumerate(scheduler.timesteps):
        t, s = grid.times[step].expand(2), grid.times[step + 1].expand(2)
        assert FLOW.timestep(t).float()[0].item() == timestep.item()  # bit for bit what the pipeline passes
        ours = ode(FLOW, model(FLOW, ours, t), ours, t, s).mean
        theirs = scheduler.step(model(FLOW, theirs, t), timestep, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "noise_level", "message"),
    [
        ("euler", 0.5, "known: ode, ddim, cps, precise, flow_sde, dance_sde"),
        ("ode", 0.5, r"ode \[0, 0\]"),
        ("ddim", 1.5, r"ddim \[0, 1\]"),
        ("cps", -0.1, "out of range"),
        ("cps", 1.5, r"cps \[0, 1\]"),
        ("flow_sde", math.nan, "out of range"),
        ("dance_sde", math.inf, "out of range"),
    ],
)
def test_bad_kernels_are_refused(name, noise_level, message):
    with pytest.raises(ValueError, match=message):
        make_kernel(name, noise_level, UNIFORM)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
def test_euler_maruyama_is_for_flow_matching(name):
    process = VariancePreserving(torch.linspace(0.99, 0.01, 10), "epsilon")
    with pytest.raises(ValueError, match="use ddim, cps or precise"):
        transition_std(make_kernel(name, 0.7, UNIFORM), process, UNIFORM)
