"""The Gaussian family without training: the model agrees with its docstring."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.arenas import gaussian as arena
from difrl.data.prompts import load_prompts
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.tasks.exact.gaussian import GaussianTask, interpolation_weights
from difrl.tasks.exact.gaussian_solutions import Normal
from samplers import Grid


def policy_of(folder: Path, **sections: Any) -> DiffusionPolicy:
    recipe = {
        "likelihood": {"kind": "forward", "times": {"kind": "uniform"}},
        "objective": {"kind": "clipped"},
        **sections,
    }
    return load_diffusion_policy(arena.build_config(folder, recipe, budget=1), keep_base=True)


@pytest.fixture(scope="module", params=["flow", "variance_preserving"])
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GaussianTask(kind=request.param).save(tmp_path_factory.mktemp(request.param), arena.STEPS)


def test_saved_and_loaded_it_is_the_exact_denoiser(task: Path) -> None:
    policy = policy_of(task)
    x_t, t = torch.randn(50, 3, dtype=torch.float64), torch.linspace(0.02, 1, 50).double()
    for prompt, setting in enumerate(arena.build_settings(policy)):
        # float32 against float64, of outputs up to 10
        torch.testing.assert_close(
            arena.build_output(policy, prompt)(x_t, t).double(), setting.base(x_t, t), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(("kernel", "noise_level"), [("ode", 0.0), ("ddim", 1.0), ("precise", 0.7)])
def test_every_sampler_of_the_policy_ends_at_the_data(task: Path, kernel: str, noise_level: float) -> None:
    """Samplers of first order: four times the steps leave about a quarter of the error."""

    def error(steps: int) -> float:
        kind = {"likelihood": {"kind": "reverse"}} if noise_level else {}
        policy = policy_of(task, rollout={"kernel": kernel, "noise_level": noise_level, "steps": steps}, **kind)
        end, data = (
            arena.build_settings(policy)[1].end(arena.build_output(policy, 1)),
            arena.build_settings(policy)[1].data,
        )
        return float(np.abs(end.cov - data.cov).max() + np.abs(end.mean - data.mean).max())

    coarse, fine = error(50), error(200)
    assert fine < 0.03
    assert fine < 0.35 * coarse


def test_rollouts_have_the_moments_of_their_chain(task: Path) -> None:
    """The policy's own samples against the closed form: four standard errors of 4096 samples."""
    policy = policy_of(
        task, rollout={"kernel": "ddim", "noise_level": 1.0, "steps": arena.STEPS}, likelihood={"kind": "reverse"}
    )
    count, prompt = 4096, load_prompts(str(task / "prompts.jsonl"))[1]
    drawn = policy.rollout([prompt] * count, torch.zeros(count).long(), torch.arange(count), NoiseKey(0, 0))
    assert drawn.images is not None
    found = drawn.images.flatten(1).double().numpy()
    end = arena.build_settings(policy)[1].end(arena.build_output(policy, 1))
    deviation = np.sqrt(np.diag(end.cov))
    assert (np.abs(found.mean(0) - end.mean) < 4 * deviation / math.sqrt(count)).all()
    # A sample covariance has variance (c_ii c_jj + c_ij²) / n, at most twice c_ii c_jj / n.
    assert (np.abs(np.cov(found.T) - end.cov) < 4 * np.outer(deviation, deviation) * math.sqrt(2 / count)).all()


def test_the_affine_task_reaches_any_covariance(tmp_path: Path) -> None:
    """gain = (Σ' − Σ) S'⁻¹ S^½ turns the denoiser of N(mean, Σ) into that of N(mean, Σ')."""
    policy = policy_of(arena.TASK.save(tmp_path, arena.STEPS, affine=True))
    old, new = np.array(arena.TASK.covariance), np.array([[0.5, 0.1, 0.0], [0.1, 2.0, 0.3], [0.0, 0.3, 1.0]])
    times = torch.tensor(policy.family.denoiser.config.times, dtype=torch.float64)
    believe(policy, old, new)
    tuned = arena.Setting(policy, Normal(np.array(arena.TASK.means[1]), new), np.zeros(3))
    x_t = torch.randn(len(times), 3, dtype=torch.float64)
    torch.testing.assert_close(
        arena.build_output(policy, 1)(x_t, times).double(), tuned.base(x_t, times), rtol=1e-4, atol=1e-4
    )


def believe(policy: DiffusionPolicy, old: np.ndarray, new: np.ndarray) -> None:
    """Set the tables of an affine task to another covariance."""
    values, vectors = np.linalg.eigh(old)
    for row, t in enumerate(policy.family.denoiser.config.times):
        at = torch.tensor([t], dtype=torch.float64)
        alpha, sigma = float(policy.process.alpha(at)), float(policy.process.sigma(at))
        root = (vectors * np.sqrt(alpha**2 * values + sigma**2)) @ vectors.T
        gain = (new - old) @ np.linalg.inv(alpha**2 * new + sigma**2 * np.eye(3)) @ root
        policy.parameters["gain"].data[row] = torch.from_numpy(gain).float()


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_rlg_of_unequal_variances_is_the_power_not_the_tilt(tmp_path: Path, weight: float) -> None:
    """One dimension, τ² the variance ratio: the ODE of RLG at w has τ^2w, tilting by exp(w r/β) has 1 / ((1 − w) + w/τ²).

    Both scores are −x / (α² v + σ²), so d log std / dt is affine in w; the tilt adds precisions instead (METHODS §6).
    """
    steps, ratio = 300, 0.5
    one = GaussianTask(covariance=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    policy = policy_of(one.save(tmp_path, steps, affine=True), rollout={"steps": steps})
    believe(policy, np.eye(3), ratio * np.eye(3))
    base, tuned = (arena.build_output(policy, 0, snapshot) for snapshot in ("base", "current"))
    end = arena.build_chain(policy, lambda x, t: base(x, t) + weight * (tuned(x, t) - base(x, t))).end()
    tilt = 1 / ((1 - weight) + weight / ratio)
    # Euler's error in 300 steps is about 1 % at w = 2.
    np.testing.assert_allclose(np.diag(end.cov), ratio**weight, rtol=0.02)
    assert weight == 1 or abs(end.cov[0, 0] / tilt - 1) > 0.05


def test_hats_interpolate_linearly_and_hold_at_the_ends() -> None:
    times = torch.tensor([0.1, 0.4, 1.0])
    rows = interpolation_weights(torch.tensor([0.0, 0.1, 0.25, 0.4, 0.85, 1.0]), times)
    expected = torch.tensor([[1, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.25, 0.75], [0, 0, 1]])
    torch.testing.assert_close(rows, expected)


def test_an_unknown_prompt_is_refused(task: Path) -> None:
    with pytest.raises(ValueError, match="no prompt 'a cat'; expected one of"):
        policy_of(task).family.encode("a cat", None, None)


def test_grid_rows_are_the_rollouts_own_times(task: Path) -> None:
    policy = policy_of(task)
    rows = policy.family.denoiser.config.times
    np.testing.assert_allclose(rows, Grid(policy.sampling.grid.times).times[: arena.STEPS].flip(0).numpy())


def test_the_weighted_divergence_of_elbo_is_the_kl_of_two_gaussians(task: Path) -> None:
    """N(m + δ, Σ) against N(m, Σ): its mean over times is δᵀΣ⁻¹δ / 2, for either process."""
    likelihood = {"kind": "forward", "weighting": "elbo", "times": {"kind": "uniform"}, "decisions": 64, "cutoff": 0.0}
    policy = policy_of(task, likelihood=likelihood, anchors=[{"to": "base", "divergence": "weighted"}])
    delta = torch.tensor([0.4, -0.3, 0.2])
    policy.parameters["mean"].data += delta
    prompts, count = load_prompts(str(task / "prompts.jsonl")), 32
    drawn = policy.rollout([prompts[0]] * count, torch.zeros(count).long(), torch.arange(count), NoiseKey(0, 0))
    found = policy.likelihoods(drawn, policy.decisions(drawn, NoiseKey(0, 0)))["divergence/base"].double()
    shift = delta.double().numpy()
    expected = shift @ np.linalg.inv(np.array(arena.TASK.covariance)) @ shift / 2
    # 64 strata of a smooth integrand, 32 times over: the standard error is below 1e-3 of it.
    assert found.mean().item() == pytest.approx(expected, rel=5e-3)
