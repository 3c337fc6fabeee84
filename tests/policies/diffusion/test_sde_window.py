"""The windows of recipes, on a grid of ten steps of which nine are noisy under a stochastic kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.sde_window import Windows, build_windows
from difrl.policies.errors import ModelError
from samplers import FlowMatching, Grid, Window, make_kernel
from tests.recipes import FLOW_GRPO, recipe

GRID = Grid(torch.linspace(1, 0, 11))
PROCESS = FlowMatching()


def windows(window: dict[str, Any], noise_level: float = 0.7) -> Windows:
    rollout = {"kernel": "flow_sde", "noise_level": noise_level, "steps": 10, "window": window}
    config = recipe("tiny-sd3", **{**FLOW_GRPO, "rollout": rollout})
    return build_windows(config, GRID, make_kernel("flow_sde", noise_level, GRID), PROCESS)


def places(found: Windows, steps: int) -> list[int]:
    """First steps of the windows of a run's first training steps."""
    return [found(NoiseKey(0, step)).start for step in range(steps)]


def test_all_steps_with_noise_and_fixed_ones() -> None:
    assert windows({"kind": "all"})(NoiseKey(0, 7)) == Window(0, 9)
    assert windows({"kind": "fixed", "start": 2, "size": 3})(NoiseKey(0, 7)) == Window(2, 3)
    assert windows({"kind": "fixed"})(NoiseKey(0, 7)) == Window(0, 1)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({"size": 3, "end": 5}, {0, 1, 2}),  # three of the first five
        ({"size": 2, "end": 5}, {0, 1, 2, 3}),
        ({"size": 2, "start": 3, "end": 5}, {3}),
        ({"size": 4, "start": 2}, {2, 3, 4, 5}),  # to the last with noise, step 8
    ],
)
def test_random_windows_cover_their_range_and_no_more(window: dict[str, int], expected: set[int]) -> None:
    found = windows({"kind": "random", **window})
    # The rarest of four places is missed by 60 draws once in 3e7 runs, and the keys are fixed.
    assert set(places(found, 60)) == expected
    assert {found(NoiseKey(0, step)).size for step in range(60)} == {window["size"]}


def test_sliding_window_by_hand() -> None:
    """The window has two steps and moves by two every third training step, until it ends before step 7."""
    found = windows({"kind": "sliding", "start": 1, "end": 7, "size": 2, "stride": 2, "every": 3})
    assert places(found, 14) == [1, 1, 1, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 5]
    assert found(NoiseKey(0, 13)) == Window(5, 2)


def test_sliding_window_as_published() -> None:
    """The setting of 2507.21802 on 25 steps: four of them, moved by one every 25 training steps, so 300 steps reach place 12."""
    assert Window.sliding(4, 0, 24, 299 // 25) == Window(11, 4)
    assert windows({"kind": "sliding", "size": 4})(NoiseKey(0, 299)) == Window(5, 4)  # on ten steps it has arrived


@pytest.mark.parametrize(
    "window", [{"kind": "random", "end": 9}, {"kind": "sliding", "end": 9}, {"kind": "fixed", "start": 8}]
)
def test_windows_outside_the_noisy_steps_are_refused(window: dict[str, Any]) -> None:
    """At this noise level the last step but one has a std below 0.01."""
    assert windows({"kind": "all"}, 0.05) != Window(0, 9)
    with pytest.raises(ModelError, match=r"rollout\.window: 1 steps from step \d.*do not fit the noisy steps 0 to"):
        windows(window, 0.05)
