"""The window of a training step: the denoising steps that are stochastic, and so decisions."""

from __future__ import annotations

from collections.abc import Callable

from difrl.config import AllWindow, FixedWindow, ProgressiveWindow, RandomWindow, RunConfig, SlidingWindow
from difrl.policies.base import NoiseKey
from difrl.policies.errors import ModelError
from samplers import Grid, Kernel, Process, Window, transition_std

Windows = Callable[[NoiseKey], Window]
"""Key of a training step -> its window."""


def build_windows(config: RunConfig, grid: Grid, kernel: Kernel, process: Process) -> Windows:
    """Build the windows of a recipe. Raise ModelError if they do not fit the steps on which the kernel has noise.

    Steps on which the kernel has almost no noise are never decisions.
    """
    rollout = config.rollout
    if rollout.silent:
        return lambda key: Window(0, 0)
    noisy = Window.noisy(transition_std(kernel, process, grid))
    if noisy.size == 0:
        raise ModelError(f"rollout.noise_level: {rollout.noise_level:g} leaves no step with noise; raise it")
    match rollout.window:
        case AllWindow():
            return lambda key: noisy
        case FixedWindow(start=start, size=size):
            low, _ = _get_range(start, None, size, noisy)
            return lambda key: Window(low, size)
        case RandomWindow(start=start, end=end, size=size, adjacent=adjacent):
            low, high = _get_range(start, end, size, noisy)
            draw = Window.random if adjacent else Window.scattered
            return lambda key: draw(size, low, high, key.seed, key.step)
        case SlidingWindow(start=start, end=end, size=size, stride=stride, every=every):
            low, high = _get_range(start, end, size, noisy)
            return lambda key: Window.sliding(size, low, high, key.step // every * stride)
        case ProgressiveWindow():
            return _build_progressive(rollout.window, noisy, config.train.steps)


def _get_range(start: int, end: int | None, size: int, noisy: Window) -> tuple[int, int]:
    """Return the first step of a window's range and the step after its last. `start` and `end` count noisy steps."""
    low, high = noisy.start + start, noisy.start + (end or noisy.size)
    if low + size > high or high > noisy.start + noisy.size:
        raise ModelError(
            f"rollout.window: {size} steps from step {low}, before step {high}, do not fit the noisy steps {noisy.start} to "
            f"{noisy.start + noisy.size - 1}; make the window smaller, start it earlier or lower its end"
        )
    return low, high


def _build_progressive(window: ProgressiveWindow, noisy: Window, steps: int) -> Windows:
    """Build windows that grow backwards from the last noisy steps with the number of the training step."""
    end, over = noisy.start + noisy.size, window.over or steps
    first, last = window.first, window.last or noisy.size
    if not first <= last <= noisy.size:
        raise ModelError(
            f"rollout.window: {first} to {last} steps do not fit the {noisy.size} noisy ones, {noisy.start} to {end - 1}; "
            "lower first and last, or raise noise_level"
        )
    return lambda key: Window.growing(first, last, end, key.step / over)
