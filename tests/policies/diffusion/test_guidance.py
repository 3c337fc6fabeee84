"""Cost and measures of guidance, counted on a random SD3 model; outputs against those of the plain wrappers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.policies.base import GuidanceSettings, NoiseKey
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from tests.recipes import recipe

PROMPTS = [Prompt(text, {}) for text in ("a red circle", "two blue squares", "a green square")]
KEY = NoiseKey(3, 0, "eval")
STEPS = 4


def policy_of(path: Path, guidance: float = 1.0, moved: float = 0.05, **rollout: Any) -> DiffusionPolicy:
    """A policy whose weights have moved away from the base."""
    policy = load_diffusion_policy(recipe(path, rollout={"guidance": guidance, **rollout}), keep_base=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(moved * torch.randn(p.shape, generator=generator))
    return policy


def drawn(policy: DiffusionPolicy, settings: GuidanceSettings, rows: slice = slice(None)) -> tuple[Rollout, int]:
    """Samples, and the number of evaluations of the model."""
    before = policy.evaluations
    rollout = policy.evaluation(PROMPTS[rows], torch.arange(3)[rows], KEY, settings)
    return rollout, policy.evaluations - before


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(
    ("settings", "models"),
    [
        (GuidanceSettings(0.0), [1, 1, 1, 1]),
        (GuidanceSettings(1.0), [1, 1, 1, 1]),
        (GuidanceSettings(1.5), [2, 2, 2, 2]),
        (GuidanceSettings(1.5, first_steps=3), [1, 1, 1, 2]),
        (GuidanceSettings(0.0, first_steps=2), [1, 1, 1, 1]),
        (GuidanceSettings(1.5, adaptive=1.1), [2, 2, 2, 2]),
    ],
    ids=str,
)
def test_what_a_weight_costs(sd3: Path, guidance: float, settings: GuidanceSettings, models: list[int]) -> None:
    """w = 0 and w = 1 evaluate one model; guidance evaluates each twice."""
    rollout, evaluations = drawn(policy_of(sd3, guidance), settings)
    each = sum(models) * (1 if guidance == 1 else 2)
    assert evaluations == 3 * each
    assert rollout.measures["cost/evaluations"].tolist() == [each] * 3
    assert rollout.measures["cost/saved"].tolist() == [0.0] * 3


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_made_and_saved_are_the_plain_cost(sd3: Path, guidance: float) -> None:
    """Below -1 every sample stops after its first step: one full step, then the conditional output of the trained model."""
    rollout, evaluations = drawn(policy_of(sd3, guidance), GuidanceSettings(1.5, adaptive=-1.1))
    full = 2 if guidance == 1 else 4
    assert rollout.measures["cost/evaluations"].tolist() == [full + STEPS - 1] * 3
    assert rollout.measures["cost/saved"].tolist() == [full * STEPS - full - STEPS + 1] * 3
    assert evaluations == 3 * (full + STEPS - 1)


def test_samples_stop_by_themselves_whatever_their_batch(sd3: Path) -> None:
    """A threshold between the samples' cosines; batches of 2 and 1, and each sample alone, agree to float order."""
    policy = policy_of(sd3, 2.0, batch=2)
    every, _ = drawn(policy, GuidanceSettings(1.5, adaptive=0.97))
    assert 0 < every.measures["cost/saved"].sum() < 3 * 4 * STEPS
    for row in range(3):
        alone, _ = drawn(policy, GuidanceSettings(1.5, adaptive=0.97), slice(row, row + 1))
        assert alone.images is not None
        assert every.images is not None
        torch.testing.assert_close(alone.images[0], every.images[row], rtol=0, atol=1e-5)
        for name in ("cost/saved", "cost/evaluations"):
            assert alone.measures[name][0] == every.measures[name][row]


def test_a_threshold_above_1_is_plain_rlg(sd3: Path) -> None:
    policy = policy_of(sd3, 2.0)
    for settings in (GuidanceSettings(1.5), GuidanceSettings(1.0), GuidanceSettings(1.5, first_steps=2)):
        plain, _ = drawn(policy, settings)
        never, _ = drawn(policy, GuidanceSettings(settings.rlg, settings.first_steps, 1.1))
        assert plain.images is not None
        torch.testing.assert_close(never.images, plain.images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_distance_to_the_base(sd3: Path, guidance: float) -> None:
    """The distance is 0 at w = 0 and grows with |w|; adaptive guidance that never stops gives the same. No sample changes."""
    policy = policy_of(sd3, guidance)
    seen = {w: drawn(policy, GuidanceSettings(w, measure=True)) for w in (0.0, 0.5, 1.0, 2.0)}
    distance = {w: rollout.measures["divergence/base"] for w, (rollout, _) in seen.items()}
    assert distance[0.0].tolist() == [0.0] * 3
    assert (distance[0.5] > 0).all()
    assert (distance[0.5] < distance[1.0]).all()
    assert (distance[1.0] < distance[2.0]).all()
    # On the first state, which all share, it is w² times that of w = 1; later states differ.
    assert (distance[2.0].mean() / distance[1.0].mean()).item() == pytest.approx(4, rel=0.5)
    each = 1 if guidance == 1 else 2
    assert {w: n for w, (_, n) in seen.items()} == {w: 3 * STEPS * each * (1 if w == 0 else 2) for w in seen}
    plain, _ = drawn(policy, GuidanceSettings(2.0))
    assert "divergence/base" not in plain.measures
    measured = seen[2.0][0]
    assert plain.images is not None
    assert measured.images is not None
    assert torch.equal(plain.images, measured.images)
    adaptive, _ = drawn(policy, GuidanceSettings(2.0, adaptive=1.1, measure=True))
    torch.testing.assert_close(adaptive.measures["divergence/base"], distance[2.0], rtol=1e-5, atol=0)


def test_the_first_state_moves_by_w_squared(sd3: Path) -> None:
    """In one step all weights share the state, so ‖out_w − out_base‖² is exactly w² ‖out_trained − out_base‖²."""
    policy = load_diffusion_policy(recipe(sd3, eval={"steps": 2}), keep_base=True)
    with torch.no_grad():
        for p in policy.parameters.values():
            p.mul_(1.05)
    from difrl.policies.diffusion.guidance import build_guidance

    sampling = policy.evaluation_sampling
    x, t = torch.randn(3, *sampling.shape, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.7).double()
    found = {}
    for w in (1.0, 1.5, -1.0):
        guided = build_guidance(policy.denoiser, 1.0, GuidanceSettings(w, measure=True), sampling.grid)
        with torch.no_grad():
            guided.denoiser(x, t, policy.prompts(PROMPTS, False))
        found[w] = guided.measures(3)["divergence/base"]
    torch.testing.assert_close(found[1.5], 2.25 * found[1.0], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[-1.0], found[1.0], rtol=1e-4, atol=0)
