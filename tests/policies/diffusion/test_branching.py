"""Branches: the noise and steps that samples share, their cost, and no influence of batches or neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from difrl.data.prompts import load_prompts
from difrl.data.rollout import Rollout
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.branching import Branching
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.errors import ModelError
from difrl.training.cost.estimate import estimate
from samplers import keyed
from tests.recipes import FLOW_GRPO, recipe
from tests.tiny_models import tiny_sd
from tests.training.test_trainer_sd3 import sd3_trainer

KEY = NoiseKey(seed=3, step=5)
WINDOW = {"kind": "fixed", "start": 1, "size": 2}


def settings(branch: Mapping[str, Any] | None, window: Mapping[str, Any] = WINDOW, **more: Any) -> dict[str, Any]:
    rollout = {"kernel": "flow_sde", "noise_level": 0.7, "steps": 5, "window": window, "branch": branch} | more
    return {**FLOW_GRPO, "rollout": rollout, "data": {"prompts_per_step": 2, "group_size": 4}}


def policy_of(path: Path, **sections: Any) -> DiffusionPolicy:
    return load_diffusion_policy(recipe(path, **sections))


def draw(policy: DiffusionPolicy, samples: list[int] | None = None) -> Rollout:
    """Two prompts with four samples each, as the trainer numbers them in two branches of two."""
    numbers = torch.tensor(range(8) if samples is None else samples)
    prompts = load_prompts("shapes:train")[:2]
    return policy.rollout([prompts[int(n) // 4] for n in numbers], numbers // 2, numbers, KEY)


def starts(rollout: Rollout) -> Tensor:
    """The states before the first decision."""
    return rollout.replay_data["x_t"][:, 0]


def test_rows_and_owners_by_hand() -> None:
    branching = Branching(size=3)
    samples = torch.tensor([3, 0, 4, 2, 1, 5, 6])
    assert [rows.tolist() for rows in branching.chunks(samples, 6)] == [[0, 1, 2, 3, 4, 5], [6]]
    assert [rows.tolist() for rows in branching.chunks(samples, 1)] == [[1, 3, 4], [0, 2, 5], [6]]
    numbers, first, owner = branching.owners(samples)
    assert (numbers.tolist(), first.tolist(), owner.tolist()) == ([0, 1, 2], [1, 0, 6], [1, 0, 1, 0, 0, 1, 2])


@pytest.mark.parametrize("prefix", ["ode", "kernel"])
def test_samples_of_a_branch_share_the_steps_before_the_window(sd3: Path, prefix: str) -> None:
    rollout = draw(policy_of(sd3, **settings({"count": 2, "prefix": prefix})))
    first = starts(rollout).unflatten(0, (4, 2))
    assert torch.equal(first[:, 0], first[:, 1])
    assert (first[0, 0] - first[1, 0]).abs().max() > 0.1  # branches of one prompt are different
    ends = rollout.replay_data["latents"].unflatten(0, (4, 2))
    assert (ends[:, 0] - ends[:, 1]).flatten(1).abs().amax(1).min() > 0.01  # and so are the samples of a branch


def test_at_step_0_only_the_initial_noise_is_shared(sd3: Path) -> None:
    rollout = draw(policy_of(sd3, **settings({"count": 2}, {"kind": "fixed", "size": 3})))
    noise = keyed((4, 4, 4), seed=3, step=5, samples=torch.arange(4), use="train/init")
    assert torch.equal(starts(rollout), noise.repeat_interleave(2, 0))


@pytest.mark.parametrize("prefix", ["ode", "kernel"])
def test_neither_batches_nor_neighbours_matter(sd3: Path, prefix: str) -> None:
    """One branch alone, batches smaller than a branch, and samples in another order give the same."""
    branch = {"count": 2, "prefix": prefix}
    whole = draw(policy_of(sd3, **settings(branch, batch=64)))
    small = policy_of(sd3, **settings(branch, batch=1))
    for name in ("latents", "x_t", "x_next", "log_prob"):
        # float32, some twenty operations a layer in another batch shape
        close = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(draw(small).replay_data[name], whole.replay_data[name], **close)
        torch.testing.assert_close(
            draw(small, [5, 3, 4, 2]).replay_data[name], whole.replay_data[name][[5, 3, 4, 2]], **close
        )


def test_one_sample_a_branch_is_a_rollout_without_branches(sd3: Path) -> None:
    """The numbers differ (branch i is sample 2 i), so the test passes the same noise itself."""
    alone, shared = policy_of(sd3, **settings(None)), policy_of(sd3, **settings({"count": 2}))
    noise = keyed((4, 4, 4), seed=3, step=5, samples=torch.arange(4), use="train/init")
    one = alone.rollout(load_prompts("shapes:train")[:1], torch.tensor([0]), torch.tensor([0]), KEY)
    two = shared.rollout(load_prompts("shapes:train")[:1], torch.tensor([0]), torch.tensor([0]), KEY)
    assert noise[0].shape == starts(one)[0].shape
    for name in ("latents", "log_prob"):
        torch.testing.assert_close(one.replay_data[name], two.replay_data[name], atol=0, rtol=0)


def test_shared_steps_are_evaluated_once_a_branch(sd3: Path) -> None:
    """2 prompts, 4 samples each, 5 steps of which 1 is before the window; 2 decisions a sample."""
    spent = {
        count: sd3_trainer(sd3, **settings(None if count is None else {"count": count})).step(0)["nfe"]
        for count in (None, 2, 1)
    }
    assert spent == {None: 8 * 5 + 8 * 2, 2: 8 * 4 + 4 * 1 + 8 * 2, 1: 8 * 4 + 2 * 1 + 8 * 2}


@pytest.mark.parametrize("branch", [None, {"count": 1}, {"count": 2}])
def test_the_estimate_counts_shared_steps_once(sd3: Path, branch: dict[str, int] | None) -> None:
    trainer = sd3_trainer(sd3, **settings(branch))
    assert estimate(trainer.config).evaluations.step == trainer.step(0)["nfe"]


def test_a_branch_is_a_group(sd3: Path) -> None:
    """Advantages are zero within each branch, although rewards differ between the branches of a prompt."""
    trainer = sd3_trainer(sd3, **settings({"count": 2}))
    scored = trainer.source.draw(0, 0, range(trainer.config.groups), lambda name: None)
    assert scored.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [p.text for p in scored.rollout.prompts[:4]] == [scored.rollout.prompts[0].text] * 4
    advantage = trainer._estimate_advantages(scored, {})
    torch.testing.assert_close(advantage.unflatten(0, (4, 2)).sum(1), torch.zeros(4), atol=1e-5, rtol=0)
    assert advantage.abs().min() > 0
    assert scored.rewards.unflatten(0, (4, 2)).mean(1).std() > 1e-3


def test_progressive_window_grows_with_the_step(sd3: Path) -> None:
    window = {"kind": "progressive", "first": 1, "last": 3}
    trainer = sd3_trainer(sd3, **settings({"count": 1}, window))
    sizes = [trainer.policy.sampling.window(NoiseKey(0, step)) for step in range(3)]  # type: ignore[attr-defined]
    assert [(w.start, w.size) for w in sizes] == [(3, 1), (2, 2), (1, 3)]
    # 8 samples of 2 prompts: shared steps twice, the others and each decision for every sample
    spent = [trainer.step(step)["nfe"] for step in range(3)]
    assert spent[0] == 3 * 2 + 2 * 8 + 1 * 8
    assert spent[1] - spent[0] == 2 * 2 + 3 * 8 + 2 * 8
    assert spent[2] - spent[1] == 1 * 2 + 4 * 8 + 3 * 8


@pytest.mark.parametrize("prefix", ["ode", "kernel"])
def test_variance_preserving_models_branch_too(tmp_path: Path, prefix: str) -> None:
    """The setting of B²-DiffuRL: DDIM at η = 1, the last steps first. Batches and records are as with flow models."""
    model = tiny_sd(tmp_path)
    window = {"kind": "progressive", "first": 2}
    sections = settings({"count": 2, "prefix": prefix}, window, kernel="ddim", noise_level=1.0)
    policy = policy_of(model, **sections)
    small = draw(policy_of(model, **{**sections, "rollout": {**sections["rollout"], "batch": 1}}))
    rollout = draw(policy)
    shared = starts(rollout).unflatten(0, (4, 2))
    assert torch.equal(shared[:, 0], shared[:, 1])
    for name in ("latents", "log_prob"):
        torch.testing.assert_close(
            small.replay_data[name], rollout.replay_data[name], atol=1e-4, rtol=1e-4
        )  # a UNet in float32
    lik = policy.likelihoods(rollout, policy.decisions(rollout, KEY))
    torch.testing.assert_close(lik.logp.detach(), rollout.replay_data["log_prob"], atol=1e-4, rtol=1e-4)


def test_progressive_window_outside_the_noisy_steps_is_refused(sd3: Path) -> None:
    quiet = settings(None, {"kind": "progressive", "first": 3}, noise_level=0.012)
    with pytest.raises(ModelError, match=r"rollout\.window: 3 to \d steps do not fit"):
        policy_of(sd3, **quiet)


@pytest.mark.parametrize("count", [1, 2])
def test_micro_batches_do_not_matter_to_branches(sd3: Path, count: int) -> None:
    def gradient(size: int) -> Tensor:
        trainer = sd3_trainer(sd3, **settings({"count": count}), train={"micro_batch": size, "max_grad_norm": 1e9})
        trainer.step(0)
        return torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])

    expected = gradient(1000)
    torch.testing.assert_close(gradient(3), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
