"""Which denoising steps of a training step's samples are stochastic, and so decisions."""

from __future__ import annotations

from collections.abc import Callable

from difrl.config import ProgressiveWindow, RunConfig, WindowConfig
from difrl.policies.base import Key
from difrl.policies.errors import ModelError
from samplers import Grid, Kernel, Process, Window, transition_std

Windows = Callable[[Key], Window]
"""The window of a training step."""


def windows_of(config: RunConfig, grid: Grid, kernel: Kernel, process: Process) -> Windows:
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
        case ProgressiveWindow():
            return _progressive(rollout.window, loud, config.train.steps)
        case WindowConfig(kind="all"):
            return lambda key: loud
        case WindowConfig(kind="fixed"):
            low, size, _ = _fitted(rollout.window, loud)
            return lambda key: Window.fixed(low, size)
        case WindowConfig():
            low, size, high = _fitted(rollout.window, loud)
            return lambda key: Window.random(size, low, high, key.seed, key.step)


def _fitted(window: WindowConfig, loud: Window) -> tuple[int, int, int]:
    """Lowest start, size, and the step after the last that may be in the window."""
    size, low, high = window.size or 1, loud.start + window.start, loud.start + loud.size
    if low + size > high:
        raise ModelError(
            f"rollout.window: {size} steps from step {low} do not fit the noisy steps {loud.start} to {high - 1}; "
            "make the window smaller or start it earlier"
        )
    return low, size, high


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
