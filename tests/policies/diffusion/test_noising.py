"""Noise by inversion: the states are those of the sampler's path for every key, with the real policy and trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from difrl.data.prompts import load_prompts
from difrl.data.rollout import Rollout
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.cost.estimate import estimate
from difrl.training.trainer import Trainer
from samplers import Grid, corrupt, invert
from tests.fakes import Brightness
from tests.recipes import recipe

INVERSION = {"kind": "forward", "decisions": 3, "noise": {"kind": "inversion"}, "share": ["t"]}


def policy_of(path: Path, /, **sections: Any) -> DiffusionPolicy:
    return load_diffusion_policy(
        recipe(path, **{"rollout": {"steps": 6, "batch": 2}, "likelihood": INVERSION, **sections})
    )


def draw(policy: DiffusionPolicy) -> Rollout:
    return policy.rollout(load_prompts("shapes:train")[:3], torch.tensor([0, 0, 1]), torch.arange(3), NoiseKey(0, 0))


def perturb(policy: DiffusionPolicy) -> None:
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(0.05)


def test_states_are_the_inverted_path_of_the_base(sd3: Path) -> None:
    policy, pretrained = policy_of(sd3), policy_of(sd3)
    rollout = draw(policy)
    perturb(policy)
    decisions = policy.decisions(rollout, NoiseKey(0, 0)).tensors
    grid = Grid(policy.sampling.grid.times[1:])
    condition = pretrained.prompts(rollout.prompts, False)
    states = invert(pretrained.denoiser(), policy.process, grid, rollout.replay_data["latents"], condition)
    for i in range(3):
        for j in range(3):
            step = int((grid.times == decisions["t"][i, j]).nonzero())
            # float32, batches of another shape
            torch.testing.assert_close(decisions["x_t"][i, j], states[i, step], atol=1e-5, rtol=1e-4)


def test_noise_is_what_corrupts_the_sample_into_the_state(sd3: Path) -> None:
    policy = policy_of(sd3)
    decisions = policy.decisions(draw(policy), NoiseKey(0, 0))
    flat = decisions.flat()
    x_t = corrupt(policy.process, flat["x0"], flat["noise"], flat["t"])
    torch.testing.assert_close(x_t, flat["x_t"], atol=1e-5, rtol=1e-5)
    assert torch.equal(decisions.tensors["t"][0], decisions.tensors["t"][1])  # of one group


def test_keys_choose_times_and_no_noise(sd3: Path) -> None:
    policy = policy_of(sd3, likelihood={**INVERSION, "decisions": 40})
    rollout = draw(policy)
    one, two = (policy.decisions(rollout, NoiseKey(0, 0, use)).tensors for use in ("a", "b"))
    seen = {float(t): x for t, x in zip(one["t"][0], one["x_t"][0], strict=True)}
    assert set(seen) == set(policy.sampling.grid.times[1:-1].tolist())
    for t, x in zip(two["t"][0], two["x_t"][0], strict=True):
        assert torch.equal(seen[float(t)], x)


@pytest.mark.parametrize("snapshot", ["base", "current"])
@pytest.mark.parametrize("updates", [1, 2])
def test_the_trainer_takes_it_and_the_plan_counts_it(sd3: Path, snapshot: str, updates: int) -> None:
    config = recipe(
        sd3,
        rollout={"steps": 6},
        likelihood={**INVERSION, "noise": {"kind": "inversion", "snapshot": snapshot}, "old": "recompute"},
        snapshots={"old": {}},
        train={"updates_per_step": updates},
    )
    policy = load_diffusion_policy(config)
    trainer = Trainer(
        config,
        policy,
        Scorer.from_rewards({"b": (Brightness(), 1.0)}, {}),
        load_prompts("shapes:train"),
        DistributedContext(),
    )
    spent = trainer.step(0)["nfe"]
    assert spent == 12 * 6 + 12 * 5 + 12 * 3 * 2  # rollout, inversion, decisions under θ and old
    assert estimate(config).evaluations.step == spent


@pytest.mark.parametrize(
    ("likelihood", "key"),
    [
        ({"times": {"kind": "uniform"}}, "likelihood.times.kind"),
        ({"share": ["noise"]}, "likelihood.share"),
        ({"noise": {"kind": "inversion", "snapshot": "ema"}}, "likelihood.noise.snapshot"),
    ],
)
def test_what_inversion_cannot_do_is_refused(likelihood: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        recipe("nowhere", likelihood={**INVERSION, **likelihood})
