"""Which denoising steps of a training step's samples are stochastic, and so decisions."""

from __future__ import annotations

from collections.abc import Callable

from difrl.config import AllWindow, FixedWindow, ProgressiveWindow, RandomWindow, RunConfig, SlidingWindow
from difrl.policies.base import NoiseKey
from difrl.policies.errors import ModelError
from samplers import Grid, Kernel, Process, Window, transition_std

Windows = Callable[[NoiseKey], Window]
"""The window of a training step."""


def build_windows(config: RunConfig, grid: Grid, kernel: Kernel, process: Process) -> Windows:
    """The windows a recipe names; ModelError where they do not fit the steps on which the kernel has noise.

    Steps on which the kernel is nearly silent are never decisions.
    """
    rollout = config.rollout
    if rollout.silent:
        return lambda key: Window(0, 0)
    loud = Window.noisy(transition_std(kernel, process, grid))
    if loud.size == 0:
        raise ModelError(f"rollout.noise_level: {rollout.noise_level:g} leaves no step with noise; raise it")
    match rollout.window:
        case AllWindow():
            return lambda key: loud
        case FixedWindow(start=start, size=size):
            low, _ = _range(start, None, size, loud)
            return lambda key: Window(low, size)
        case RandomWindow(start=start, end=end, size=size):
            low, high = _range(start, end, size, loud)
            return lambda key: Window.random(size, low, high, key.seed, key.step)
        case SlidingWindow(start=start, end=end, size=size, stride=stride, every=every):
            low, high = _range(start, end, size, loud)
            return lambda key: Window.sliding(size, low, high, key.step // every * stride)
        case ProgressiveWindow():
            return _progressive(rollout.window, loud, config.train.steps)


def _range(start: int, end: int | None, size: int, loud: Window) -> tuple[int, int]:
    """Lowest step, and the step after the last, that may be in a window of `size`; counted from the first with noise."""
    low, high = loud.start + start, loud.start + (end or loud.size)
    if low + size > high or high > loud.start + loud.size:
        raise ModelError(
            f"rollout.window: {size} steps from step {low}, before step {high}, do not fit the noisy steps {loud.start} to "
            f"{loud.start + loud.size - 1}; make the window smaller, start it earlier or lower its end"
        )
    return low, high


def _progressive(window: ProgressiveWindow, loud: Window, steps: int) -> Windows:
    """Grows from the last noisy steps backwards, by the number of the training step."""
    end, over = loud.start + loud.size, window.over or steps
    first, last = window.first, window.last or loud.size
    if not first <= last <= loud.size:
        raise ModelError(
            f"rollout.window: {first} to {last} steps do not fit the {loud.size} noisy ones, {loud.start} to {end - 1}; "
            "lower first and last, or raise noise_level"
        )
    return lambda key: Window.growing(first, last, end, key.step / over)
