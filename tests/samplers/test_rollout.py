from __future__ import annotations

import pytest
import torch

from samplers import (
    Condition,
    FlowMatching,
    Grid,
    VariancePreserving,
    Window,
    advance,
    keyed,
    make_kernel,
    ode,
    rollout,
)

FLOW = FlowMatching()
GRID = Grid(torch.linspace(1, 0, 7))


def model(x_t, t, condition):
    return torch.tanh(x_t * condition.tensors["gain"][:, :, None]) - t[:, None, None].to(x_t.dtype)


def run(samples, window, *, kernel=None, process=FLOW, denoiser=model, **options):
    """Draw some samples of a step. All randomness and the condition depend on the sample alone."""
    gain = 1 + 0.1 * torch.tensor(samples, dtype=torch.float32)[:, None]

    def draw(use, index=0):
        return keyed((2, 3), seed=0, step=5, samples=samples, use=use, index=index)

    return rollout(
        denoiser,
        process,
        GRID,
        kernel or make_kernel("flow_sde", 0.7, GRID),
        draw("init"),
        Condition({"gain": gain}),
        window=window,
        noise=lambda step: draw("sde", step),
        **options,
    )


@pytest.mark.parametrize("name", ["ddim", "cps", "precise", "flow_sde", "dance_sde"])
def test_evaluating_a_recorded_decision_again_gives_the_same_number(name):
    kernel = make_kernel(name, 0.7, GRID)
    trajectory = run([0, 1, 2], Window(1, 3), kernel=kernel)
    assert trajectory.log_prob.shape == trajectory.t.shape == (3, 3)
    assert trajectory.x_t.shape == (3, 3, 2, 3)
    assert trajectory.t[0].tolist() == pytest.approx([5 / 6, 4 / 6, 3 / 6])
    assert torch.equal(trajectory.s[:, :-1], trajectory.t[:, 1:])
    condition = Condition({"gain": 1 + 0.1 * torch.arange(3.0)[:, None]})
    for j in range(3):
        x_t, t, s = trajectory.x_t[:, j], trajectory.t[:, j], trajectory.s[:, j]
        again = kernel(FLOW, model(x_t, t, condition), x_t, t, s)
        assert torch.equal(again.log_prob(trajectory.x_next[:, j]), trajectory.log_prob[:, j])


def test_decisions_in_a_row_share_their_states_and_the_rest_is_the_ode():
    trajectory = run([0, 1], Window(1, 3))
    assert torch.equal(trajectory.x_next[:, :-1], trajectory.x_t[:, 1:])
    condition = Condition({"gain": 1 + 0.1 * torch.arange(2.0)[:, None]})
    x = trajectory.x_next[:, -1]
    for step in (4, 5):
        t, s = GRID.times[step].expand(2), GRID.times[step + 1].expand(2)
        x = ode(FLOW, model(x, t, condition), x, t, s).mean
    assert torch.equal(x, trajectory.x0)


def test_samples_do_not_depend_on_the_batch():
    whole, part = run([4, 7, 9], Window.all(6)), run([9], Window.all(6))
    torch.testing.assert_close(part.x0[0], whole.x0[2], rtol=0, atol=1e-6)  # but for the order of float sums
    torch.testing.assert_close(part.log_prob[0], whole.log_prob[2], rtol=0, atol=1e-5)


def test_an_empty_window_is_the_ode():
    """Its trajectory has J = 0 in all its shapes, so that nothing downstream needs a special case."""
    trajectory = run([0, 1], Window(0, 0))
    assert trajectory.x_t.shape == trajectory.x_next.shape == (2, 0, 2, 3)
    assert trajectory.t.shape == trajectory.s.shape == trajectory.log_prob.shape == (2, 0)
    deterministic = run([0, 1], Window(0, 0), kernel=make_kernel("ode", 0.0, GRID))
    assert torch.equal(trajectory.x0, deterministic.x0)


def test_log_probs_summed_are_d_times_those_averaged():
    mean, total = run([0, 1], Window.all(6)), run([0, 1], Window.all(6), log_prob_reduce="sum")
    torch.testing.assert_close(total.log_prob, 6 * mean.log_prob)


def test_a_half_precision_model_leaves_the_states_in_float32():
    def half(x_t, t, condition):
        assert x_t.dtype == torch.float32
        return model(x_t, t, condition).bfloat16()

    trajectory = run([0, 1], Window.all(6), denoiser=half)
    assert {trajectory.x0.dtype, trajectory.x_t.dtype, trajectory.log_prob.dtype} == {torch.float32}
    assert trajectory.t.dtype == torch.float64


def test_a_half_precision_start_is_raised():
    x_init, condition = torch.ones(1, 2, 3).bfloat16(), Condition({"gain": torch.ones(1, 1)})

    def single(x_t, t, condition):
        assert x_t.dtype == torch.float32
        return model(x_t, t, condition)

    arguments = (single, FLOW, GRID, ode, x_init, condition)
    assert rollout(*arguments, window=Window(0, 0), noise=lambda step: x_init).x0.dtype == torch.float32
    assert advance(*arguments, steps=2).dtype == torch.float32
    assert advance(*arguments, steps=0).dtype == torch.float32


def test_on_step_sees_every_state():
    seen = []
    trajectory = run([0], Window.all(6), on_step=lambda step, x: seen.append((step, x)))
    assert [step for step, _ in seen] == list(range(6))
    assert torch.equal(seen[-1][1], trajectory.x0)


def test_nothing_is_differentiated():
    weight = torch.ones((), requires_grad=True)
    trajectory = run([0], Window.all(6), denoiser=lambda x_t, t, condition: weight * x_t)
    assert not trajectory.x0.requires_grad
    assert not trajectory.log_prob.requires_grad


def test_gaussian_data_come_out_of_a_sampled_run(build_task, nothing):
    data = build_task(FLOW)
    grid = Grid(torch.linspace(1, 0, 101))
    samples = range(2048)
    x_init = keyed((2,), seed=1, step=0, samples=samples, use="init")
    trajectory = rollout(
        data.denoiser,
        FLOW,
        grid,
        make_kernel("ddim", 1.0, grid),
        x_init,
        nothing(2048),
        window=Window(20, 40),
        noise=lambda step: keyed((2,), seed=1, step=0, samples=samples, use="sde", index=step),
    )
    # Standard errors of 2048 samples: 0.024 in the mean, 0.038 in the variance, which 100 steps bias by 0.04.
    x0 = trajectory.x0.double()
    torch.testing.assert_close(x0.mean(0), data.mean, rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(x0.T), data.cov, rtol=0, atol=0.15)


def test_refusals():
    with pytest.raises(ValueError, match=r"adds no noise .* at steps \[1, 2\]"):
        run([0], Window(1, 2), kernel=make_kernel("ode", 0.0, GRID))
    with pytest.raises(ValueError, match=r"adds no noise .* at steps \[0, 1, 2, 3, 4\]"):
        run([0], Window.all(6), kernel=make_kernel("cps", 0.0, GRID))
    with pytest.raises(ValueError, match="never a decision"):
        run([0], Window(0, 6))
    with pytest.raises(ValueError, match="one condition a sample"):
        rollout(
            model,
            FLOW,
            GRID,
            ode,
            torch.zeros(2, 2, 3),
            Condition({"gain": torch.ones(1, 1)}),
            window=Window(0, 0),
            noise=lambda step: torch.zeros(2, 2, 3),
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["ddim", "flow_sde"])
def test_a_run_on_cuda_is_the_run_on_the_cpu(name):
    kernel = make_kernel(name, 0.7, GRID)

    def go(device):
        return rollout(
            model,
            FLOW,
            GRID,
            kernel,
            keyed((2, 3), seed=0, step=0, samples=[0, 1], use="init", device=device),
            Condition({"gain": torch.ones(2, 1)}).to(device),
            window=Window.all(6),
            noise=lambda step: keyed((2, 3), seed=0, step=0, samples=[0, 1], use="sde", index=step),
        )

    here, there = go("cpu"), go("cuda")
    assert there.x0.is_cuda
    torch.testing.assert_close(there.x0.cpu(), here.x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(there.log_prob.cpu(), here.log_prob, rtol=0, atol=1e-4)


def test_variance_preserving_runs_too():
    process = VariancePreserving(torch.linspace(0.999, 0.001, 1000).double(), "v_prediction")
    trajectory = run([0, 1], Window.all(6), process=process, kernel=make_kernel("ddim", 1.0, GRID))
    assert trajectory.x0.isfinite().all()
    assert trajectory.log_prob.isfinite().all()


def advanced(samples, steps, *, kernel=ode, noise=None, process=FLOW):
    gain = 1 + 0.1 * torch.tensor(samples, dtype=torch.float32)[:, None]
    x_init = keyed((2, 3), seed=0, step=5, samples=samples, use="init")
    return advance(model, process, GRID, kernel, x_init, Condition({"gain": gain}), steps=steps, noise=noise)


@pytest.mark.parametrize("process", [FLOW, VariancePreserving(torch.linspace(0.999, 0.001, 1000).double(), "epsilon")])
def test_a_run_in_two_parts_is_the_run(process):
    """The ODE up to the window and the rest from there give the same floats as a rollout from noise."""
    kernel, window = make_kernel("ddim", 0.7, GRID), Window(3, 2)
    whole = run([0, 1], window, kernel=kernel, process=process)
    gain = Condition({"gain": 1 + 0.1 * torch.arange(2.0)[:, None]})
    rest = rollout(
        model,
        process,
        GRID,
        kernel,
        advanced([0, 1], 3, process=process),
        gain,
        window=window,
        noise=lambda step: keyed((2, 3), seed=0, step=5, samples=[0, 1], use="sde", index=step),
        start=3,
    )
    for name in ("x0", "x_t", "x_next", "t", "s", "log_prob"):
        assert torch.equal(getattr(rest, name), getattr(whole, name)), name


def test_a_prefix_drawn_from_the_kernel_is_the_states_of_a_run():
    kernel = make_kernel("flow_sde", 0.7, GRID)
    whole = run([0, 1], Window.all(6), kernel=kernel)
    noise = {step: keyed((2, 3), seed=0, step=5, samples=[0, 1], use="sde", index=step) for step in range(4)}
    assert torch.equal(advanced([0, 1], 4, kernel=kernel, noise=noise.__getitem__), whole.x_t[:, 4])


def test_a_rollout_cannot_start_after_its_window():
    with pytest.raises(ValueError, match="cannot start at step 2"):
        run([0], Window(1, 2), start=2)
    with pytest.raises(ValueError, match="a prefix has 0 to 5"):
        advanced([0], 6)
