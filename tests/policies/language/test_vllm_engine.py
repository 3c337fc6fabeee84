from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from difrl.data.prompts import Prompt
from difrl.policies.base import NoiseKey
from difrl.policies.errors import ModelError
from difrl.policies.importance_sampling import CORRECTION, MISMATCH
from difrl.policies.language.load import load_language_policy
from difrl.policies.language.merge_lora import plain_weights
from difrl.policies.language.policy import LanguagePolicy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.trainer import Trainer
from tests.policies.language import vllm_double
from tests.policies.language.threes import recipe
from tests.tiny_models import tiny_lm

PROMPTS = [Prompt("1+1=", {}), Prompt("12+30=", {}), Prompt("7+8=", {}), Prompt("7+8=", {})]
ENGINE = {"engine": "vllm", "temperature": 0.7}
LORA = {"train": "lora", "lora": {"rank": 2}}


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", vllm_double)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # restored after the test, whatever it was


def policy_of(model: Path, /, **sections: Any) -> LanguagePolicy:
    return load_language_policy(recipe(model, **{"generation": ENGINE, **sections}))


def llm_of(policy: LanguagePolicy) -> Any:
    engine: Any = policy.engines.rollout
    return engine.llm


def stirred(policy: LanguagePolicy) -> None:
    """The trained weights, moved away from the pretrained ones."""
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)


def rows_of(policy: LanguagePolicy, numbers: list[int], step: int = 0) -> Any:
    prompts = [PROMPTS[i] for i in numbers]
    return policy.rollout(prompts, torch.tensor(numbers), torch.tensor(numbers), NoiseKey(0, step))


def test_without_vllm_the_message_says_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"pip install vllm.*engine: transformers"):
        policy_of(model)


@pytest.mark.parametrize("train", [{"train": "full"}, LORA])
@pytest.mark.usefixtures("vllm")
def test_it_draws_from_the_networks_own_distribution(model: Path, train: dict[str, Any]) -> None:
    policy = policy_of(model, model=train)
    stirred(policy)
    rollout = rows_of(policy, [0, 1, 2, 3])
    # The double holds its own copy of the weights: agreement means that those that are trained were sent.
    assert float(rollout.measures[MISMATCH].max()) < 1e-5
    torch.testing.assert_close(rollout.measures[CORRECTION], torch.ones(4), rtol=1e-5, atol=0)
    eos = policy.tokenizer.eos[0]
    mask, tokens = rollout.replay_data["mask"], rollout.replay_data["tokens"]
    assert mask[:, 0].all()
    assert (tokens[~mask] == policy.tokenizer.pad).all()
    for row, counts in zip(tokens, mask, strict=True):
        kept = row[counts].tolist()
        assert eos not in kept[:-1]
        assert len(kept) == 6 or kept[-1] == eos


@pytest.mark.usefixtures("vllm")
def test_a_sample_has_the_noise_of_its_key_whatever_its_batch(model: Path) -> None:
    policy = policy_of(model)
    whole, alone = rows_of(policy, [0, 1, 2, 3]), rows_of(policy, [2])
    assert torch.equal(whole.replay_data["tokens"][2], alone.replay_data["tokens"][0])
    assert not torch.equal(
        whole.replay_data["tokens"][2], whole.replay_data["tokens"][3]
    )  # the same prompt, another number
    assert not torch.equal(whole.replay_data["tokens"], rows_of(policy, [0, 1, 2, 3], step=1).replay_data["tokens"])


@pytest.mark.usefixtures("vllm")
def test_weights_are_sent_when_they_have_changed_and_only_then(model: Path) -> None:
    policy = policy_of(model)
    log = llm_of(policy).log
    rows_of(policy, [0])
    rows_of(policy, [1])
    assert log == ["receive_weights", "reset_prefix_cache"]
    stirred(policy)
    rows_of(policy, [0])
    assert log == ["receive_weights", "reset_prefix_cache"] * 2


@pytest.mark.usefixtures("vllm")
def test_with_lora_the_base_is_sent_where_the_base_draws(model: Path) -> None:
    policy = policy_of(model, model=LORA, rollout={"snapshot": "base"})
    stirred(policy)
    assert float(rows_of(policy, [0, 1]).measures[MISMATCH].max()) < 1e-5
    pretrained = load_language_policy(recipe(model)).network.model.state_dict()
    for name, tensor in llm_of(policy).network.state_dict().items():
        assert torch.equal(tensor, pretrained[name])


def test_plain_weights_are_those_that_pefts_own_merge_leaves(model: Path) -> None:
    policy = load_language_policy(recipe(model, model=LORA))
    stirred(policy)
    found = {name: tensor.clone() for name, tensor in plain_weights(policy.network.model)}
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in policy.network.model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    merged = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in policy.network.model.named_parameters()
        if "lora_" not in name
    }
    assert found.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7)  # one addition, in another order


@pytest.mark.usefixtures("vllm")
def test_it_sleeps_between_rollouts_unless_told_not_to(model: Path) -> None:
    policy = policy_of(model)
    assert not llm_of(policy).awake
    rows_of(policy, [0])
    assert not llm_of(policy).awake
    policy = policy_of(model, generation={**ENGINE, "sleep": False, "gpu_memory": 0.5}, rollout={"batch": 3})
    assert llm_of(policy).awake
    assert llm_of(policy).size == (3, 0.5)


@pytest.mark.usefixtures("vllm")
def test_prompts_beyond_the_context_are_refused_as_elsewhere(model: Path) -> None:
    policy = policy_of(model)
    with pytest.raises(ValueError, match="context of 64 leaves room for 58"):
        policy.rollout([Prompt("1" * 59, {})], torch.tensor([0]), torch.tensor([0]), NoiseKey(0, 0))


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(("target", "other"), [("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")])
def test_an_adapter_on_weights_that_two_modules_share_is_refused(
    vllm: None, tmp_path: Path, target: str, other: str
) -> None:
    """vLLM receives shared weights once, so it would use the adapter in both places."""
    tied, lora = tiny_lm(tmp_path / "tied", tied=True), {"rank": 2, "targets": ["q_proj", target]}
    with pytest.raises(ModelError, match=rf"targets: .*{target} shares its weights with {other}.*engine: transformers"):
        policy_of(tied, model={"train": "lora", "lora": lora})
    policy_of(tiny_lm(tmp_path / "untied"), model={"train": "lora", "lora": lora})


@pytest.mark.parametrize("train", [{"train": "full"}, LORA])
@pytest.mark.usefixtures("vllm")
def test_a_run_learns_from_it_and_reports_the_mismatch(model: Path, train: dict[str, Any]) -> None:
    config = recipe(model, model=train, generation=ENGINE, train={"updates_per_step": 2})
    policy = load_language_policy(config)
    trainer = Trainer(config, policy, Scorer.build(config.rewards, [], "cpu"), PROMPTS, DistributedContext())
    for step in range(2):
        metrics = trainer.step(step)  # the check of the first update included
        assert 0 <= metrics[MISMATCH] < 1e-5
        assert metrics[CORRECTION] == pytest.approx(1, abs=1e-5)
    assert llm_of(policy).log.count("receive_weights") == 2


@pytest.mark.usefixtures("vllm")
def test_log_probabilities_before_the_temperature_would_be_noticed(model: Path) -> None:
    policy = policy_of(model)
    llm_of(policy).processed = False
    assert float(rows_of(policy, [0, 1, 2, 3]).measures[MISMATCH].min()) > 0.05
