from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from samplers import FlowMatching, Grid, VariancePreserving, Window, make_kernel, rollout, solve

FLOW = FlowMatching()
FLOW_OPTIONS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def by_ode(denoiser, process, scheduler, steps, x_init, condition):
    grid = Grid.from_scheduler(scheduler, process, steps)
    return rollout(
        denoiser,
        process,
        grid,
        make_kernel("ode", 0.0, grid),
        x_init,
        condition,
        window=Window(0, 0),
        noise=lambda step: x_init,
    ).x0


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_is_the_ode(shift, build_task, nothing):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    denoiser, x_init = build_task(FLOW).denoiser, torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    before = dict(vars(scheduler))
    run = (denoiser, FLOW, scheduler, 12, x_init, nothing(5))
    torch.testing.assert_close(solve(*run), by_ode(*run), rtol=0, atol=1e-5)
    assert vars(scheduler).keys() == before.keys()
    assert scheduler.sigmas is before["sigmas"]
    assert scheduler.step_index is None


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_the_ode(prediction, build_task, nothing):
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False, steps_offset=1, **SD_BETAS)
    process = VariancePreserving(scheduler.alphas_cumprod, prediction)
    x_init = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    run = (build_task(process).denoiser, process, scheduler, 20, x_init, nothing(5))
    torch.testing.assert_close(solve(*run), by_ode(*run), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler(**FLOW_OPTIONS),
        UniPCMultistepScheduler(**FLOW_OPTIONS),
        FlowMatchHeunDiscreteScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_higher_order_flow_solvers_beat_euler(scheduler, build_task, nothing):
    data = build_task(FLOW)
    x_init = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = [
        (solve(data.denoiser, FLOW, each, 20, x_init, nothing(64)) - data.end(x_init)).abs().max()
        for each in (scheduler, FlowMatchEulerDiscreteScheduler())
    ]
    assert errors[0] < 0.5 * errors[1]
    assert errors[0] < 0.03


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler(**SD_BETAS),
        UniPCMultistepScheduler(**SD_BETAS),
        HeunDiscreteScheduler(**SD_BETAS),
        EulerDiscreteScheduler(**SD_BETAS),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_variance_preserving_solvers_end_where_the_ode_ends(scheduler, build_task, nothing):
    """This includes solvers that work on a rescaled state."""
    process = VariancePreserving(scheduler.alphas_cumprod, "epsilon")
    data = build_task(process)
    x_init = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = solve(data.denoiser, process, scheduler, 100, x_init, nothing(64))
    # Euler's error is 0.05; the others' are 0.02 and less.
    assert (found - data.end(x_init)).abs().max() < 0.06


def test_a_half_precision_model_is_integrated_in_float32(build_task, nothing):
    denoiser = build_task(FLOW).denoiser
    found = solve(
        lambda x_t, t, condition: denoiser(x_t, t, condition).bfloat16(),
        FLOW,
        FlowMatchEulerDiscreteScheduler(),
        8,
        torch.ones(2, 2, dtype=torch.bfloat16),
        nothing(2),
    )
    assert found.dtype == torch.float32


def test_a_scheduler_for_other_outputs_is_refused(build_task, nothing):
    with pytest.raises(ValueError, match="configured for 'epsilon'"):
        solve(build_task(FLOW).denoiser, FLOW, DDIMScheduler(), 4, torch.zeros(1, 2), nothing(1))
