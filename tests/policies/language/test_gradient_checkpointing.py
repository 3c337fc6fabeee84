"""Precision, attention and recomputed layers of language models: their effect on memory, and none on results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difrl.config import RunConfig
from difrl.config.checks import find_conflicts
from difrl.data.prompts import Prompt
from difrl.policies.base import GuidanceSettings, NoiseKey
from difrl.policies.errors import ModelError
from difrl.policies.language.gradient_checkpointing import recompute_layers
from difrl.policies.language.load import load_language_policy
from difrl.policies.language.policy import LanguagePolicy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.trainer import Trainer
from tests.policies.language.threes import recipe

PROMPTS = [Prompt("1+1=", {}), Prompt("12+30=", {})]
TRAIN: Mapping[str, dict[str, Any]] = {"full": {"train": "full"}, "lora": {"train": "lora", "lora": {"rank": 2}}}


def stirred(policy: LanguagePolicy) -> LanguagePolicy:
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    return policy


def drawn(policy: LanguagePolicy) -> Any:
    return policy.rollout(PROMPTS, torch.arange(2), torch.arange(2), NoiseKey(0, 0))


def kept_and_gradient(policy: LanguagePolicy) -> tuple[int, dict[str, Tensor]]:
    """Bytes that a differentiable pass stores besides the parameters, and the gradient of the sum of ℓ."""
    rollout = drawn(policy)
    sizes: dict[int, int] = {}
    own = {p.data_ptr() for p in policy.network.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lik = policy.likelihoods(rollout, policy.decisions(rollout, NoiseKey(0, 0)))
    lik.logp.sum().backward()
    return sum(sizes.values()), {name: p.grad.clone() for name, p in policy.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("train", TRAIN)
def test_recomputed_layers_keep_less_and_have_the_same_gradient(model: Path, train: str) -> None:
    plain = stirred(load_language_policy(recipe(model, model=TRAIN[train])))
    thrifty = stirred(load_language_policy(recipe(model, model={**TRAIN[train], "gradient_checkpointing": True})))
    (much, expected), (little, found) = kept_and_gradient(plain), kept_and_gradient(thrifty)
    assert little < 0.5 * much
    assert found.keys() == expected.keys() == plain.parameters.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name  # the same operations in the same order
    if train == "lora":  # the first layer too, whose input takes no gradient
        assert float(found[next(name for name in found if "layers.0." in name and "lora_B" in name)].norm()) > 0


def test_recomputed_layers_generate_the_same_with_their_cache(model: Path) -> None:
    plain, thrifty = (load_language_policy(recipe(model, model={"gradient_checkpointing": on})) for on in (False, True))
    assert torch.equal(drawn(plain).replay_data["tokens"], drawn(thrifty).replay_data["tokens"])
    widths = []
    layer: Any = thrifty.network.model.base_model.layers[0]
    layer.register_forward_pre_hook(lambda module, arguments: widths.append(arguments[0].shape[1]))
    drawn(thrifty)
    assert set(widths[1:]) == {1}  # after the prompt a token at a time


def test_a_model_without_layers_to_recompute_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear marks no layers"):
        recompute_layers(nn.Linear(1, 1))


def test_eager_attention_gives_what_sdpa_gives(model: Path) -> None:
    sdpa, eager = (load_language_policy(recipe(model, model={"attention": name})) for name in ("sdpa", "eager"))
    assert eager.network.model.config._attn_implementation == "eager"
    rollout = drawn(sdpa)
    decisions = sdpa.decisions(rollout, NoiseKey(0, 0))
    torch.testing.assert_close(
        eager.recompute_logprobs(rollout, decisions), sdpa.recompute_logprobs(rollout, decisions)
    )


def test_attention_that_is_not_installed_says_so(model: Path) -> None:
    with pytest.raises(ModelError, match=r"(?i)flash.?attn|flash.?attention"):
        load_language_policy(recipe(model, model={"attention": "flash_attention_2"}))


@pytest.mark.parametrize(
    ("path", "sections", "message"),
    [
        ("model.attention", {"model": {"attention": "xformers"}}, "language models have sdpa"),
        ("generation.correction", {"generation": {"correction": 3.0}}, "nothing is corrected"),
        ("generation.sleep", {"generation": {"sleep": False}}, "engine: vllm"),
        ("generation.gpu_memory", {"generation": {"gpu_memory": 0.2}}, "engine: vllm"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(path: str, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        recipe(Path("m"), **sections)
    assert path in str(error.value)


def test_other_engines_take_their_settings() -> None:
    config: RunConfig = recipe(Path("m"), generation={"engine": "vllm", "correction": 3.0, "sleep": False})
    assert not find_conflicts(config)


@pytest.mark.parametrize("train", TRAIN)
def test_bfloat16_trains_and_keeps_what_is_trained_in_float32(model: Path, train: str) -> None:
    config = recipe(
        model,
        model={**TRAIN[train], "dtype": "bfloat16", "gradient_checkpointing": True},
        train={"updates_per_step": 2},
    )
    policy = load_language_policy(config)
    assert {p.dtype for p in policy.parameters.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    trainer = Trainer(config, policy, Scorer.build(config.rewards, [], "cpu"), PROMPTS, DistributedContext())
    for step in range(2):
        trainer.step(step)  # the check of the first update included
    assert any(not torch.equal(p, before[name]) for name, p in policy.parameters.items())


@pytest.mark.parametrize("train", TRAIN)
def test_in_bfloat16_the_base_of_rlg_is_the_base(model: Path, train: str) -> None:
    """A blend with w = 0 from the second token on is the base alone. Autocast around the exchange of weights caches casts."""
    config = recipe(model, model={**TRAIN[train], "dtype": "bfloat16"})
    policy = stirred(load_language_policy(config, keep_base=True))
    arguments = PROMPTS, torch.arange(2), NoiseKey(0, 0)
    blended = policy.evaluation(*arguments, GuidanceSettings(rlg=1e-9))
    base = policy.evaluation(*arguments, GuidanceSettings(rlg=0.0))
    tuned = policy.evaluation(*arguments)
    assert blended.texts == base.texts
    assert base.texts != tuned.texts
