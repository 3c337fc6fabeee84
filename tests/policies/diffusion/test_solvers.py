"""Every scheduler of diffusers as `rollout.solver`: its samples depend on their keys alone, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)

from difrl.data.prompts import Prompt
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.load import build_samplings, load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.errors import ModelError
from samplers import FlowMatching, VariancePreserving, draws_noise
from tests.recipes import recipe
from tests.tiny_models import SD_TABLE, tiny_sd, tiny_sd3

PROMPTS = [Prompt("a red circle", {}), Prompt("two blue squares", {})]
KEY = NoiseKey(seed=3, step=5)


def is_scheduler(name: str) -> bool:
    found = getattr(diffusers, name, None)
    return isinstance(found, type) and issubclass(found, SchedulerMixin) and found is not SchedulerMixin


SCHEDULERS = [name for name in dir(diffusers) if is_scheduler(name)]
REPEATED = {
    "sd": {
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
    },
    "sd3": {"FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"},
}
"""Some that must be accepted."""
NOISY = {
    "sd": {"DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler", "SASolverScheduler"},
    "sd3": {"FlowMatchLCMScheduler", "SASolverScheduler"},
}
"""Some that must be refused."""


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DiffusionPolicy]:
    folder = tmp_path_factory.mktemp("models")
    paths = {"sd": tiny_sd(folder / "sd"), "sd3": tiny_sd3(folder / "sd3")}
    return {name: load_diffusion_policy(recipe(path)) for name, path in paths.items()}


def draw(policy: DiffusionPolicy, solver: str, seed: int, **more: Any) -> torch.Tensor:
    config = recipe("nowhere", rollout={"solver": solver, "steps": 4, **more})
    policy.sampling, policy.evaluation_sampling = build_samplings(config, policy.family)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    latents = policy.rollout(PROMPTS, torch.arange(2), torch.arange(2), KEY).replay_data["latents"]
    assert torch.equal(torch.get_rng_state(), before)
    return latents.nan_to_num()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_every_scheduler_repeats_itself_or_is_refused(model: str, policies: dict[str, DiffusionPolicy]) -> None:
    policy, outcome = policies[model], dict[str, str]()
    for name in SCHEDULERS:
        try:
            first, second = draw(policy, name, 0), draw(policy, name, 1)
        except ModelError as error:
            kinds = {"noisy": "draws noise of its own", "unfit": "cannot drive this model"}
            outcome[name] = next((kind for kind, words in kinds.items() if words in str(error)), str(error))
            continue
        assert torch.equal(first, second), name
        outcome[name] = "repeated"
    found = {kind: {name for name, found in outcome.items() if found == kind} for kind in ("repeated", "noisy")}
    assert found["repeated"] >= REPEATED[model]
    assert found["noisy"] >= NOISY[model]
    assert set(outcome.values()) == {"repeated", "noisy", "unfit"}
    assert len(outcome) == len(SCHEDULERS) > 30


def test_the_configuration_of_the_model_decides(tmp_path: Path) -> None:
    """The same class is deterministic under one scheduler_config.json and stochastic under another."""
    noisy = tiny_sd(tmp_path / "sd", DPMSolverMultistepScheduler(**_betas(), algorithm_type="sde-dpmsolver++"))
    with pytest.raises(ModelError, match=r"DPMSolverMultistepScheduler draws noise of its own under the model's"):
        load_diffusion_policy(recipe(noisy, rollout={"solver": "DPMSolverMultistepScheduler"}))
    assert draws_noise(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), FlowMatching(), 4)
    assert not draws_noise(FlowMatchEulerDiscreteScheduler(), FlowMatching(), 4)


def _betas() -> dict[str, Any]:
    return {key: value for key, value in SD_TABLE.items() if key.startswith(("beta", "num"))}


def test_a_probe_leaves_the_generator_alone() -> None:
    ddim = DDIMScheduler(clip_sample=False)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert not draws_noise(ddim, VariancePreserving(ddim.alphas_cumprod, "epsilon"), 4)
    ancestral = diffusers.EulerAncestralDiscreteScheduler()
    assert draws_noise(ancestral, VariancePreserving(ancestral.alphas_cumprod, "epsilon"), 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_latents_are_not_clipped_where_the_configuration_does_not_mention_it(
    tmp_path: Path, policies: dict[str, DiffusionPolicy]
) -> None:
    """PNDM has no clip_sample, and the default of DDIM is to clip pixels to [-1, 1]."""
    table = {key: value for key, value in SD_TABLE.items() if key != "clip_sample"}
    policy = load_diffusion_policy(recipe(tiny_sd(tmp_path / "pndm", PNDMScheduler(**table, skip_prk_steps=True))))
    found = draw(policy, "DDIMScheduler", 0)
    assert found.abs().max() > 1
    torch.testing.assert_close(found, draw(policies["sd"], "DDIMScheduler", 0), rtol=0, atol=0)
