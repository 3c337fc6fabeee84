from __future__ import annotations

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from samplers import Counting, FlowMatching, Grid, VariancePreserving, Window, invert, ode, rollout

FLOW = FlowMatching()
SD = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)


def with_its_limit(data):
    """Return the exact denoiser with its limit at t = 0, where it would divide by sigma = 0: the expected noise is 0."""

    def denoiser(x_t, t, condition):
        if t[0] == 0:
            return data.process.combine(x_t, torch.zeros_like(x_t), t)
        return data.denoiser(x_t, t, condition)

    return denoiser


def resampled(denoiser, process, grid, states, step, nothing):
    """Return the end of the ODE from the state of a step."""
    rest = Grid(grid.times[step:])
    x = states[:, step]
    run = rollout(denoiser, process, rest, ode, x, nothing(len(x)), window=Window(0, 0), noise=lambda step: x)
    return run.x0


@pytest.mark.parametrize("process", [FLOW, VariancePreserving(SD.alphas_cumprod, "epsilon")], ids=["flow", "vp"])
def test_sampling_from_an_inverted_state_returns_the_sample(process, build_task, nothing):
    """The error is first order in the step: at most 0.16 (VP) at 100 steps for samples of size 1, and half of that at 200."""
    data = build_task(process)
    x0 = data.mean + torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (100, 200):
        grid = Grid(torch.linspace(1, 0, steps + 1).double())
        states = invert(with_its_limit(data), process, grid, x0, nothing(32))
        found = [resampled(with_its_limit(data), process, grid, states, step, nothing) for step in (1, steps // 2)]
        errors.append([float((x - x0).abs().max()) for x in found])
    for one, half in zip(*errors, strict=True):
        assert one < 0.2
        assert half < 0.55 * one


def test_flow_steps_by_hand(nothing):
    """Velocity v = x: from t to s it is x + (s - t) x, so 2, 2 · 1.25, 2.5 · 1.25, … in quarters."""
    states = invert(lambda x, t, c: x, FLOW, Grid(torch.linspace(1, 0, 5)), torch.full((1, 2), 2.0), nothing(1))
    assert states[0, :, 0].tolist() == pytest.approx([2 * 1.25**k for k in (4, 3, 2, 1)])


def test_ddim_inversion_is_diffusers(nothing):
    """The scheduler of diffusers takes the same steps for outputs at the states' own times (its pipelines call a step late)."""
    theirs = DDIMInverseScheduler.from_config({**SD.config, "timestep_spacing": "leading"})
    theirs.set_timesteps(10)
    process = VariancePreserving(SD.alphas_cumprod, "epsilon")
    times = process.time(theirs.timesteps.double())  # of timesteps 0, 100, …, 900
    x0 = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def denoiser(x_t, t, condition):
        return torch.tanh(x_t) * (0.5 + t[:, None])

    x, expected = x0, []
    for t, target in zip(times[:-1], theirs.timesteps[1:], strict=True):
        x = theirs.step(denoiser(x, t.expand(3), None), target, x).prev_sample
        expected.insert(0, x)
    found = invert(denoiser, process, Grid(times.flip(0)), x0, nothing(3))
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-5, atol=1e-6)  # their alphas are float32


def test_each_step_is_one_evaluation_and_no_noise(build_task, nothing):
    model = Counting(with_its_limit(build_task(FLOW)))
    grid, x0 = Grid(torch.linspace(1, 0, 6)), torch.ones(3, 2)
    first, second = (invert(model, FLOW, grid, x0, nothing(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert model.evaluations == 2 * 3 * 5


def test_clean_predictions_at_t_0_hold_no_noise(nothing):
    """On a grid that ends before clean data they do: for x0_hat = 0 the next state is x sigma_t / sigma_s."""
    process, times = VariancePreserving(SD.alphas_cumprod, "sample"), torch.tensor([1.0, 0.5, 0.25]).double()
    states = invert(lambda x, t, c: torch.zeros_like(x), process, Grid(times), torch.ones(1, 2).double(), nothing(1))
    expected = process.sigma(times[:2]) / process.sigma(times[2])
    assert states[0, :, 0].tolist() == pytest.approx(expected.tolist())
    with pytest.raises(ValueError, match="inversion begins with the noise"):
        invert(lambda x, t, c: x, process, Grid(torch.linspace(1, 0, 5)), torch.ones(1, 2), nothing(1))
