"""Samples of training drawn by quantised weights, corrected by importance weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from difrl.data.prompts import Prompt
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.errors import ModelError
from difrl.policies.importance_sampling import CORRECTION, MISMATCH
from difrl.policies.language.load import load_language_policy
from difrl.policies.rollout_precision import check_precision, quantizable, quantized
from difrl.training.cost.estimate import estimate
from tests.helpers import perturb
from tests.recipes import AWM, FLOW_GRPO, recipe, text_recipe
from tests.training.test_trainer_sd3 import sd3_trainer

LORA = {"train": "lora", "lora": {"rank": 4}}
INT8 = {"precision": "int8"}
REVERSE = {**FLOW_GRPO, "rollout": {**FLOW_GRPO["rollout"], **INT8}}
RECORDED_MEANS = {
    **REVERSE,
    "likelihood": {"kind": "reverse", "old": "recorded"},
    "objective": {"kind": "ratio_normalised"},
}
PROMPTS = [Prompt("a red circle", {}), Prompt("two blue squares", {}), Prompt("a green square", {})]
DRAW = (PROMPTS, torch.arange(3), torch.arange(3), NoiseKey(3, 5))


def int8(weight: Tensor) -> Tensor:
    """Round each row to 256 levels, where 127.5 stands for its largest entry."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127.5
    return (weight / scale).round().clamp(-128, 127) * scale


def adapted() -> tuple[nn.Module, nn.Linear]:
    torch.manual_seed(0)
    base = nn.Linear(32, 24)
    base.requires_grad_(False)
    base.weight[:, 0] = 0.25  # above all entries: the largest lies between two levels, and -127.5 may become either
    layer = LoraLinear(base, "default", LoraConfig(r=4, lora_alpha=4, init_lora_weights=False), r=4, lora_alpha=4)
    return nn.Sequential(layer), base


def test_frozen_weights_are_rounded_and_the_adapter_is_the_trained_one() -> None:
    module, base = adapted()
    x = torch.randn(7, 32)
    rounded = x @ int8(base.weight).T + base.bias
    with torch.no_grad():
        change = module(x) - base(x)
        with quantized(module, "int8", torch.float32):
            torch.testing.assert_close(module(x) - change, rounded, rtol=1e-4, atol=1e-5)
            perturb({name: p for name, p in module.named_parameters() if "lora" in name})
            moved = module(x)
        assert not torch.allclose(module(x) - base(x), change, atol=0.1)
        torch.testing.assert_close(moved - (module(x) - base(x)), rounded, rtol=1e-4, atol=1e-5)


def test_weights_are_the_same_objects_afterwards_also_after_an_error() -> None:
    module, base = adapted()
    weight = base.weight
    with suppress(RuntimeError), quantized(module, "int8", torch.float32):
        assert base.weight is not weight
        raise RuntimeError
    assert base.weight is weight


def test_another_type_than_that_of_the_passes_is_cast_first() -> None:
    """Full training holds float32 weights of a network that runs in bfloat16."""
    layer = nn.Linear(16, 8)
    x = torch.randn(5, 16)
    with torch.no_grad(), quantized(nn.Sequential(layer), "int8", torch.bfloat16):
        assert layer.weight.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


def test_layers_that_cannot_be_quantised_are_refused_before_the_first_rollout() -> None:
    with pytest.raises(ModelError, match="no linear layers"):
        check_precision(nn.Conv2d(1, 1, 1), "int8", torch.float32)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match=r"float8_dynamic.*compute capability"):
            check_precision(nn.Sequential(nn.Linear(16, 16)), "float8_dynamic", torch.bfloat16)


def images(path: Path, sections: Mapping[str, Any], model: Mapping[str, Any] = LORA) -> DiffusionPolicy:
    policy = load_diffusion_policy(recipe(path, **{**sections, "model": model}), keep_base=True)
    perturb(policy.parameters)
    return policy


@pytest.mark.parametrize("model", [LORA, {"train": "full"}], ids=["lora", "full"])
def test_recorded_steps_of_images_are_those_of_the_training_network(sd3: Path, model: dict[str, Any]) -> None:
    policy = images(sd3, RECORDED_MEANS, model)
    rollout = policy.rollout(*DRAW)
    data, decisions = rollout.replay_data, policy.decisions(rollout, NoiseKey(0, 0))
    # ℓ and the mean of the kernel at recorded states, by the network under training.
    assert torch.equal(policy.rollout_logprobs(rollout, decisions), data["log_prob"])
    torch.testing.assert_close(policy.recompute_logprobs(rollout, decisions), data["log_prob"], rtol=1e-4, atol=1e-5)
    with policy.using("current") as model:
        evaluation = model(policy.prepare(rollout, decisions, [None]), None)
    torch.testing.assert_close(evaluation.transition.mean, data["mean"].flatten(0, 1), rtol=1e-4, atol=1e-5)
    # ℓ by the network that drew: the same steps evaluated with rounded weights.
    with quantized(policy.module, "int8", torch.float32):
        sampler = policy.recompute_logprobs(rollout, decisions)
    apart = data["log_prob"] - sampler
    assert float(apart.abs().max()) > 1e-4  # float error is below 1e-5
    torch.testing.assert_close(data["correction"], apart.exp(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rollout.measures[MISMATCH], apart.abs().mean(dim=1), rtol=0.05, atol=1e-5)
    torch.testing.assert_close(rollout.measures[CORRECTION], data["correction"].mean(dim=1))
    # They are factors of the loss.
    weight = policy.likelihoods(rollout, decisions)["weight"]
    torch.testing.assert_close(weight.float(), data["correction"])


def test_a_weight_is_bounded_and_multiplies_that_of_the_step(sd3: Path) -> None:
    bounded = {**REVERSE, "rollout": {**REVERSE["rollout"], "correction": 0.5}}
    plain = {**bounded, "rollout": {**FLOW_GRPO["rollout"]}}
    weighted = {"likelihood": {"kind": "reverse", "step_weight": "slope"}}
    policy = images(sd3, {**bounded, **weighted})
    rollout = policy.rollout(*DRAW)
    decisions = policy.decisions(rollout, NoiseKey(0, 0))
    assert (rollout.replay_data["correction"] == 0.5).all()
    other = images(sd3, {**plain, **weighted})
    unbound = other.decisions(other.rollout(*DRAW), NoiseKey(0, 0))
    expected = 0.5 * other.likelihoods(rollout, unbound)["weight"]
    torch.testing.assert_close(policy.likelihoods(rollout, decisions)["weight"], expected)


def test_evaluations_are_drawn_by_the_model_itself(sd3: Path) -> None:
    arguments = PROMPTS, torch.arange(3), NoiseKey(3, 0, "eval")
    one, other = (images(sd3, sections).evaluation(*arguments).images for sections in (REVERSE, FLOW_GRPO))
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)


def test_a_sample_does_not_depend_on_its_batch(sd3: Path) -> None:
    policy = images(sd3, {**REVERSE, "model": LORA})
    together = policy.rollout(*DRAW).replay_data
    alone = policy.rollout(PROMPTS[2:], torch.tensor([2]), torch.tensor([2]), DRAW[-1]).replay_data
    torch.testing.assert_close(together["latents"][2:], alone["latents"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together["correction"][2:], alone["correction"], rtol=1e-4, atol=1e-5)


def test_the_weights_of_a_snapshot_are_those_that_are_rounded(sd3: Path) -> None:
    drawn_by = {**REVERSE, "rollout": {**REVERSE["rollout"], "snapshot": "old"}, "snapshots": {"old": {}}}
    still, policy = (load_diffusion_policy(recipe(sd3, **drawn_by)) for _ in range(2))
    perturb(policy.parameters)
    assert torch.equal(policy.rollout(*DRAW).replay_data["x_t"], still.rollout(*DRAW).replay_data["x_t"])
    policy.snapshots.update(0)
    assert not torch.equal(policy.rollout(*DRAW).replay_data["x_t"], still.rollout(*DRAW).replay_data["x_t"])


@pytest.mark.parametrize("model", [LORA, {"train": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize(
    "sections", [REVERSE, RECORDED_MEANS, {**AWM, "rollout": INT8}], ids=["old", "means", "forward"]
)
def test_images_train_and_the_first_update_starts_at_ratio_1(
    sd3: Path, sections: dict[str, Any], model: dict[str, Any]
) -> None:
    trainer = sd3_trainer(sd3, **{**sections, "model": model})
    rows = [trainer.step(0), trainer.step(1)]
    corrected = sections["likelihood"]["kind"] == "reverse"
    assert all((MISMATCH in row) == corrected for row in rows)
    if corrected:
        assert all(0 < row[MISMATCH] < 0.1 for row in rows)


def test_a_dry_run_counts_the_second_evaluation_of_recorded_steps(sd3: Path) -> None:
    """12 samples of 4 steps, 3 of them recorded; the run's own count is the same."""
    config = recipe(sd3, **{**REVERSE, "model": LORA})
    found = estimate(config)
    assert found.evaluations.rollout == 12 * (4 + 3)
    trainer = sd3_trainer(sd3, **{**REVERSE, "model": LORA})
    assert trainer.step(0)["nfe"] == found.evaluations.step
    assert found.memory["weights of rollouts, int8"] == sum(
        x.weight.numel() for x in quantizable(trainer.policy.module)
    )


def test_texts_are_drawn_by_rounded_weights_and_scored_by_the_networks_own(lm: Path) -> None:
    config = text_recipe(lm, model={"train": "lora", "lora": {"rank": 2}}, rollout={**INT8, "batch": 2})
    policy = load_language_policy(config)
    output = policy.network.model.get_output_embeddings()
    assert output not in quantizable(policy.module)
    rollout = policy.rollout([Prompt("1+1=", {})] * 3, torch.arange(3), torch.arange(3), NoiseKey(0, 0))
    data, decisions = rollout.replay_data, policy.decisions(rollout, NoiseKey(0, 0))
    torch.testing.assert_close(policy.recompute_logprobs(rollout, decisions), data["log_prob"], rtol=1e-4, atol=1e-5)
    with quantized(policy.module, "int8", torch.float32):
        sampler = policy.recompute_logprobs(rollout, decisions)
    weight = torch.where(data["mask"], (data["log_prob"] - sampler).exp().clamp(max=2.0), 1.0)
    torch.testing.assert_close(data["correction"], weight, rtol=1e-4, atol=1e-5)
    assert float(rollout.measures[MISMATCH].min()) > 1e-6
    assert policy.engines.evaluation is not policy.engines.rollout


@pytest.mark.parametrize(
    ("path", "sections", "message"),
    [
        ("rollout.precision", {**REVERSE, "objective": {"kind": "clipped", "decisions": "mean"}}, "importance weights"),
        ("rollout.precision", {"rollout": INT8, "data": {"rows": "samples", "train": "x.jsonl"}}, "none are drawn"),
        (
            "rollout.correction",
            {**FLOW_GRPO, "rollout": {**FLOW_GRPO["rollout"], "correction": 3.0}},
            "nothing is corrected",
        ),
        ("rollout.correction", {"rollout": {**INT8, "correction": 3.0}}, "no density"),
        ("rollout.precision", {"rollout": INT8, "model": {"shard": "weights"}}, "FSDP2 cannot gather"),
    ],
)
def test_combinations_without_meaning_are_refused(path: str, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        recipe("tiny-sd3", **sections)
    assert path in str(error.value)


def test_settings_of_texts_apply_to_texts() -> None:
    text_recipe("tiny-lm", rollout=INT8, generation={"correction": 3.0})
    for sections, message in (
        ({"rollout": {**INT8, "correction": 3.0}}, "setting of image models"),
        ({"rollout": INT8, "generation": {"engine": "vllm"}}, "weights of its own"),
        ({"rollout": INT8, "generation": {"sleep": False}}, "engine: vllm"),
    ):
        with pytest.raises(ValueError, match=message):
            text_recipe("tiny-lm", **sections)
