"""SVDD on a random SD3 model: it raises the score, sample by sample, at the stated cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.policies.base import TRAINED, NoiseKey
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.diffusion.svdd import SVDDSettings, draw_with_svdd
from difrl.policies.errors import ModelError
from tests.recipes import recipe

PROMPTS = [Prompt(text, {}) for text in ("a red circle", "two blue squares", "a green square")]
KEY = NoiseKey(3, 0, "sample")


def brightness(rollout: Rollout) -> Tensor:
    assert rollout.images is not None
    return rollout.images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def policy(sd3: Path) -> DiffusionPolicy:
    return load_diffusion_policy(recipe(sd3, rollout={"batch": 4}))


def search(policy: DiffusionPolicy, candidates: int, temperature: float, rows: slice = slice(None)) -> Rollout:
    numbers = torch.arange(3)[rows]
    return draw_with_svdd(
        policy, PROMPTS[rows], numbers, KEY, TRAINED, SVDDSettings(candidates, temperature), brightness
    )


def test_the_greedy_search_brightens_every_image(policy: DiffusionPolicy) -> None:
    one, many = (brightness(search(policy, candidates, 0.0)) for candidates in (1, 6))
    assert (many > one).all()
    assert (many - one).mean() > 0.005


def test_a_high_temperature_is_no_search(policy: DiffusionPolicy) -> None:
    """All candidates are equally likely, so the mean is that of one candidate, up to its own noise."""
    one, cold, hot = (brightness(search(policy, m, a)).mean() for m, a in ((1, 0.0), (6, 0.0), (6, 1e6)))
    assert abs(hot - one) < 0.5 * (cold - one)


def test_a_sample_does_not_depend_on_its_batch(policy: DiffusionPolicy) -> None:
    """A batch of 4 holds one sample with 3 candidates, two with 2."""
    for candidates in (2, 3):
        every = search(policy, candidates, 0.01)
        alone = search(policy, candidates, 0.01, slice(2, 3))
        assert every.images is not None
        assert alone.images is not None
        torch.testing.assert_close(alone.images[0], every.images[2], rtol=0, atol=1e-5)


def test_its_cost_is_counted(policy: DiffusionPolicy) -> None:
    """Times 1, 0.667, 0.334, 0.001, 0: one evaluation, M for either noisy step, which serve the third, and one for the last."""
    assert search(policy, 5, 0.0).measures["cost/evaluations"].tolist() == [1 + 5 + 5 + 0 + 1] * 3


def test_a_solver_has_no_kernel_to_draw_from(sd3: Path) -> None:
    solved = load_diffusion_policy(recipe(sd3, rollout={"solver": "DPMSolverMultistepScheduler"}))
    with pytest.raises(ModelError, match=r"this run samples with a solver; train with rollout\.solver: null"):
        search(solved, 2, 0.0)
