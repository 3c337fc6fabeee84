"""Frozen weights in CPU memory under training. Where they lie while a layer does not run, every number is NaN here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

from difrl.policies.base import NoiseKey
from difrl.policies.diffusion import offload as offloading
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from tests.helpers import perturb
from tests.recipes import FLOW_GRPO, load_training_prompts, recipe
from tests.tiny_models import tiny_sd

MOVED: dict[int, Tensor] = {}
"""Weights of layers that do not run."""


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Move weights out as on a GPU: the storage that a layer computed with is not that of the idle weight."""

    def tensors(group: ModuleGroup) -> Iterator[Tensor]:
        for module in group.modules:
            yield from (*module.parameters(), *module.buffers())
        yield from (*group.parameters, *group.buffers)

    def onload(group: ModuleGroup) -> None:
        for tensor in tensors(group):
            if (away := MOVED.pop(id(tensor), None)) is not None:
                tensor.data = away.clone()

    def offload(group: ModuleGroup) -> None:
        for tensor in tensors(group):
            if id(tensor) in MOVED:
                continue
            MOVED[id(tensor)] = tensor.data
            tensor.data = torch.full_like(tensor.data, torch.nan if tensor.is_floating_point() else 0)

    def copy_to(device: torch.device, parameter: nn.Parameter) -> Tensor:
        return MOVED.get(id(parameter), parameter.detach()).clone()

    monkeypatch.setattr(offloading, "copy_to", copy_to)
    monkeypatch.setattr(ModuleGroup, "_onload_from_memory", onload)
    monkeypatch.setattr(ModuleGroup, "_offload_to_memory", offload)
    yield
    MOVED.clear()


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd")


def measure(policy: DiffusionPolicy) -> dict[str, Tensor]:
    """Return samples, ℓ and its gradient, under θ and with the adapter off."""
    perturb(policy.parameters)
    prompts = load_training_prompts(recipe("tiny-sd3"))[:3]
    rollout = policy.rollout(prompts, torch.arange(3), torch.arange(3), NoiseKey(0, 0))
    decisions = policy.decisions(rollout, NoiseKey(0, 0))
    base = policy.recompute_logprobs(rollout, decisions, snapshot="base")
    lik = policy.likelihoods(rollout, decisions)
    lik.logp.sum().backward()
    gradients = {name: p.grad for name, p in policy.parameters.items() if p.grad is not None}
    return {"images": rollout.images, "base": base, "logp": lik.logp.detach(), **gradients}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("model", ["sd35", "sd"])
def test_samples_and_gradients_are_those_of_weights_that_stay(
    request: pytest.FixtureRequest, model: str, checkpointed: bool
) -> None:
    settings = {"train": "lora", "gradient_checkpointing": checkpointed}
    likelihood = FLOW_GRPO if model == "sd35" else {}
    config = recipe(request.getfixturevalue(model), model=settings, **likelihood)
    expected = measure(load_diffusion_policy(config))
    offloaded = recipe(request.getfixturevalue(model), model={**settings, "offload": "weights"}, **likelihood)
    policy = load_diffusion_policy(offloaded)
    assert MOVED
    assert not any(id(p) in MOVED for p in policy.parameters.values())
    found = measure(policy)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    idle = [p for p in policy.module.parameters() if not p.requires_grad]
    assert all(id(p) in MOVED for p in idle)


@pytest.mark.gpu
def test_weights_lie_in_cpu_memory_on_a_gpu(sd35: Path) -> None:
    settings = {"train": "lora", "gradient_checkpointing": True}
    expected = measure(load_diffusion_policy(recipe(sd35, model=settings, **FLOW_GRPO), "cuda"))
    policy = load_diffusion_policy(recipe(sd35, model={**settings, "offload": "weights"}, **FLOW_GRPO), "cuda")
    for found in (measure(policy), measure(policy)):  # layers are copied ahead from the second pass on
        assert found["logp"].is_cuda
        assert found["images"].isfinite().all()
    places = {p.requires_grad: p.device.type for p in policy.module.parameters()}
    assert places == {True: "cuda", False: "cpu"}
    first = measure(load_diffusion_policy(recipe(sd35, model={**settings, "offload": "weights"}, **FLOW_GRPO), "cuda"))
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
