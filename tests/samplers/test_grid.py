from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from samplers import FlowMatching, Grid, VariancePreserving, Window, make_kernel, transition_std

FLOW = FlowMatching()


def test_flow_times_are_the_scheduler_sigmas():
    grid = Grid.from_scheduler(FlowMatchEulerDiscreteScheduler(), FLOW, 4)
    # Linear from 1 to 0.001, then 0: the last step is nearly empty, and stays so.
    assert grid.times.tolist() == pytest.approx([1, 0.667, 0.334, 0.001, 0], abs=1e-6)
    assert (grid.steps, grid.times.dtype) == (4, torch.float64)


def test_the_scheduler_is_not_changed():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = scheduler.sigmas.clone()
    Grid.from_scheduler(scheduler, FLOW, 4)
    assert torch.equal(scheduler.sigmas, before)


def test_dynamic_shift_is_the_pipelines():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="sequence_length"):
        Grid.from_scheduler(scheduler, FLOW, 4)
    grid = Grid.from_scheduler(scheduler, FLOW, 4, sequence_length=2176)
    scheduler.set_timesteps(4, mu=0.825)  # half-way between 256 and 4096 tokens: half-way between 0.5 and 1.15
    torch.testing.assert_close(grid.times.float(), scheduler.sigmas)


def test_given_sigmas_are_passed_on():
    grid = Grid.from_scheduler(FlowMatchEulerDiscreteScheduler(), FLOW, 4, sigmas=[1.0, 0.75, 0.5, 0.25])
    assert grid.times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_table_times_by_hand():
    scheduler = DDIMScheduler(num_train_timesteps=10, timestep_spacing="leading", steps_offset=1)
    process = VariancePreserving(scheduler.alphas_cumprod, "epsilon")
    grid = Grid.from_scheduler(scheduler, process, 5)
    assert scheduler.num_inference_steps is None
    assert grid.times.tolist() == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])  # indices 9 7 5 3 1, then clean
    scheduler.register_to_config(set_alpha_to_one=False)
    assert Grid.from_scheduler(scheduler, process, 5).times[-1].item() == pytest.approx(0.1)  # index 0
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    assert Grid.from_scheduler(solver, process, 5).times[0].item() == 1.0
    for end, time in (("zero", 0.0), ("sigma_min", 0.1)):
        solver = DPMSolverMultistepScheduler(10, final_sigmas_type=end)
        assert Grid.from_scheduler(solver, process, 5).times[-1].item() == pytest.approx(time)


def test_a_scheduler_for_other_outputs_is_refused():
    ddim = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="'v_prediction' and the model predicts 'epsilon'"):
        Grid.from_scheduler(ddim, VariancePreserving(ddim.alphas_cumprod, "epsilon"), 5)
    with pytest.raises(ValueError, match="'flow_prediction'"):
        Grid.from_scheduler(ddim, FLOW, 5)
    with pytest.raises(ValueError, match="use_flow_sigmas=True"):
        Grid.from_scheduler(DPMSolverMultistepScheduler(prediction_type="flow_prediction"), FLOW, 5)


@pytest.mark.parametrize("times", [[1.0], [0.0, 1.0], [1.5, 0.0], [1.0, 0.5, 0.5, 0.0], [[1.0, 0.0]], [1.0, -0.5]])
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match="fall inside"):
        Grid(torch.tensor(times))


def test_a_scheduler_of_two_calls_a_step_gives_no_grid():
    with pytest.raises(ValueError, match=r"samplers\.solve"):
        Grid.from_scheduler(FlowMatchHeunDiscreteScheduler(), FLOW, 5)


@given(steps=st.integers(1, 60), size=st.integers(0, 60), seed=st.integers(0, 100), step=st.integers(0, 100))
def test_no_window_holds_the_last_step(steps, size, seed, step):
    last = steps - 1
    assert list(Window.all(steps).indices) == list(range(last))
    Window.all(steps).check(steps)
    if size <= last:
        window = Window.random(size, 0, last, seed, step)
        window.check(steps)
        assert len(window.indices) == size
        assert last not in window
    if size:
        with pytest.raises(ValueError, match="never a decision"):
            Window(steps - size if steps >= size else 0, size).check(steps)


def test_random_windows_are_keyed_and_cover_their_range():
    starts = [Window.random(2, 1, 6, seed=3, step=step).start for step in range(200)]
    assert set(starts) == {1, 2, 3, 4}
    assert starts == [Window.random(2, 1, 6, seed=3, step=step).start for step in range(200)]
    assert starts != [Window.random(2, 1, 6, seed=4, step=step).start for step in range(200)]
    with pytest.raises(ValueError, match="does not fit"):
        Window.random(3, 0, 2, seed=0, step=0)


@given(size=st.integers(1, 6), low=st.integers(0, 4), more=st.integers(0, 5), step=st.integers(0, 1000))
def test_scattered_steps_are_distinct_in_order_and_in_their_range(size: int, low: int, more: int, step: int) -> None:
    window = Window.scattered(size, low, low + size + more, seed=0, step=step)
    assert len(set(window.indices)) == size
    assert window.indices == sorted(window.indices)
    assert low <= window.start == window.indices[0]
    assert window.indices[-1] < low + size + more
    assert [i for i in range(low + size + more) if i in window] == window.indices
    window.check(low + size + more + 1)


def test_every_choice_of_scattered_steps_is_drawn() -> None:
    """Three of the first five steps, as Flow-DPPO's recipe draws them: ten choices, and others for each seed."""
    drawn = [tuple(Window.scattered(3, 0, 5, seed=3, step=step).indices) for step in range(300)]
    assert set(drawn) == set(itertools.combinations(range(5), 3))
    assert drawn == [tuple(Window.scattered(3, 0, 5, seed=3, step=step).indices) for step in range(300)]
    assert drawn != [tuple(Window.scattered(3, 0, 5, seed=4, step=step).indices) for step in range(300)]
    assert Window(1, 3, (0, 2)).indices == [1, 2, 5]
    with pytest.raises(ValueError, match="no gaps, or one >= 0 between each two"):
        Window(1, 3, (1,))
    with pytest.raises(ValueError, match=r"does not fit into steps 0 \.\. 1"):
        Window.scattered(3, 0, 2, seed=0, step=0)


def test_window_of_the_noisy_steps():
    """SD3's default grid ends 0.001, 0: DDIM and CPS enter the empty step with almost no noise."""
    grid = Grid.from_scheduler(FlowMatchEulerDiscreteScheduler(), FLOW, 10)
    stds = transition_std(make_kernel("ddim", 0.7, grid), FLOW, grid)
    assert stds[8] < 1e-3 < stds[7]
    assert Window.noisy(stds) == Window(0, 8)
    assert Window.noisy(transition_std(make_kernel("flow_sde", 0.7, grid), FLOW, grid)) == Window.all(10)
    assert Window.noisy(transition_std(make_kernel("ode", 0.0, grid), FLOW, grid)) == Window(0, 0)


def test_noisy_steps_are_the_first_run():
    """They begin at the floor and end before the first noiseless step; the last step is never one."""
    stds = torch.tensor([0.0, 0.005, 0.01, 0.5, 0.0, 0.5, 0.5], dtype=torch.float64)
    assert Window.noisy(stds) == Window(2, 2)
    assert Window.noisy(stds[1:4]) == Window(1, 1)
    assert Window.noisy(stds[3:4]) == Window(0, 0)


def test_windows_count_from_zero():
    with pytest.raises(ValueError, match="start >= 0"):
        Window(-1, 2)


def test_sliding_window_stays_at_the_end_of_its_range():
    """l <- min(l + s, T - w): two steps inside 1 .. 5, two further at each move."""
    assert [Window.sliding(2, 1, 6, shift) for shift in (0, 2, 4, 6)] == [Window(start, 2) for start in (1, 3, 4, 4)]
    assert Window.sliding(5, 1, 6, 9) == Window(1, 5)
    for size, shift in ((6, 0), (2, -1)):
        with pytest.raises(ValueError, match="does not fit"):
            Window.sliding(size, 1, 6, shift)


def test_growing_window_takes_the_last_steps_first():
    """Sizes 2, 3, 4 for a third of the run each, all ending before step 9."""
    found = [Window.growing(2, 4, 9, step / 6) for step in range(8)]
    assert [(w.start, w.size) for w in found] == [(7, 2), (7, 2), (6, 3), (6, 3), (5, 4), (5, 4), (5, 4), (5, 4)]


def test_growing_window_as_published():
    """The run of 2503.11240: 100 rounds of 20 steps, split points 14 to 20. Ours leave out the deterministic last step."""
    for level in range(100):
        assert Window.growing(13, 19, 19, level / 100).size + 1 == 14 + level * 7 // 100


@pytest.mark.parametrize(("first", "last", "end"), [(0, 3, 5), (3, 2, 5), (2, 6, 5)])
def test_impossible_growing_windows_are_refused(first, last, end):
    with pytest.raises(ValueError, match="a window cannot grow"):
        Window.growing(first, last, end, 0.0)
