"""`difrl check` of language models: counts worked by hand, and agreement with the real model and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import difrl.training.cost.estimate
from difrl.config import RunConfig
from difrl.data.prompts import load_prompts
from difrl.policies.errors import ModelError
from difrl.policies.language.engines import Engines
from difrl.policies.language.lm_head import CausalLM
from difrl.policies.language.load import load_language_policy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.cost.estimate import estimate
from difrl.training.cost.table import estimate_table
from difrl.training.trainer import Trainer
from tests.texts import Ones, prompt_file, shown_recipe

TO_BASE = {"to": "base", "divergence": "k3", "coefficient": 0.1}
LORA = {"train": "lora", "lora": {"rank": 2}}


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difrl.training.cost.estimate, "measure_matmul_speed", lambda device, dtype, threads: 1e9)


def test_tokens_by_hand(lm: Path, tmp_path: Path) -> None:
    """6 samples of 4 + 5 tokens; evaluations of 6 twice, and sheets of 2 × 2 samples twice."""
    config = shown_recipe(lm, tmp_path / "run", prompt_file(tmp_path), anchors=[TO_BASE])
    found = estimate(config)
    counts, tally = found.evaluations, found.model.dry.tally
    assert (found.model.generated, counts.rollout, counts.gradient, counts.without_gradient) == (30, 54, 54, 54)
    assert counts.evaluation == (2 * 6 + 2 * 4) * 9
    assert (tally.together, tally.drawn) == (6, 6)
    sections: dict[str, Any] = {"train": {"micro_batch": 12}, "data": {"evaluation": None}}
    few = estimate(shown_recipe(lm, tmp_path / "run", prompt_file(tmp_path), **sections))
    assert (few.model.dry.tally.together, few.evaluations.evaluation) == (2, 0)


def test_reference_texts_are_counted_for_the_run(lm: Path, tmp_path: Path) -> None:
    """3 texts of 4 + 5 tokens for each prompt; 2 steps of 2 prompts use 4 prompts."""
    shaped = {"rewards": [{"import": "tests.texts:Ones", "shape": {"kind": "par"}}], "references": {"count": 3}}
    config = shown_recipe(lm, tmp_path / "run", prompt_file(tmp_path), **shaped)
    assert estimate(config).evaluations.reference_samples == 4 * 3 * 9


def test_a_step_generates_no_more_than_was_estimated(lm: Path, tmp_path: Path) -> None:
    config = shown_recipe(lm, tmp_path / "run", prompt_file(tmp_path))
    trainer = Trainer(
        config,
        load_language_policy(config),
        Scorer.from_rewards({"ones": (Ones(), 1.0)}, {}),
        load_prompts(config.data.train),
        DistributedContext(),
    )
    assert 0 < trainer.step(0)["nfe"] <= (estimate(config).model.generated or 0)


def texts_read(config: RunConfig, monkeypatch: pytest.MonkeyPatch, correction: float | None) -> int:
    """Count the texts that pass through a network in a step, without drawing. correction: treat draws as another engine's."""
    policy = load_language_policy(config)
    own = policy.engines.evaluation
    policy.engines = Engines(own, own, correction)
    scorer, prompts = Scorer.from_rewards({"ones": (Ones(), 1.0)}, {}), load_prompts(config.data.train)
    trainer, sizes, hidden = (
        Trainer(config, policy, scorer, prompts, DistributedContext()),
        list[int](),
        CausalLM.hidden,
    )
    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "hidden", lambda self, t, a: (sizes.append(len(t)), hidden(self, t, a))[1])
        trainer.step(0)
    return sum(sizes)


def test_centred_anchors_and_texts_of_another_engine_take_one_more_pass(
    lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 samples of 4 + 5 tokens, two anchors on decisions: the dry run counts what either adds to a step."""

    def config_of(centred: bool, **generation: str) -> RunConfig:
        k1 = {"divergence": "k1", "place": "decision", "centred": centred, "coefficient": 0.1}
        sections: dict[str, Any] = {"teachers": {"big": {"path": str(lm)}}, "generation": generation}
        anchors = [{"to": "base", **k1}, {"to": "big", **k1}]
        return shown_recipe(lm, tmp_path / "run", prompt_file(tmp_path), anchors=anchors, **sections)

    plain, centred, drawn = (
        estimate(config).evaluations for config in (config_of(False), config_of(True), config_of(False, engine="vllm"))
    )
    assert (plain.rollout, plain.without_gradient) == (54, 2 * 54)
    assert (centred.rollout, centred.without_gradient) == (54, 3 * 54)
    assert (drawn.rollout, drawn.without_gradient) == (2 * 54, 2 * 54)
    read = texts_read(config_of(False), monkeypatch, None)
    assert texts_read(config_of(True), monkeypatch, None) - read == 6
    assert texts_read(config_of(False), monkeypatch, 2.0) - read == 6


@pytest.mark.parametrize("model", [LORA, {"train": "full"}])
def test_parameters_and_memory_are_those_of_the_real_model(lm: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    sections: dict[str, Any] = {"snapshots": {"old": {"decay": 0.9}}, "teachers": {"big": {"path": str(lm)}}}
    anchors = [TO_BASE, {"to": "big", "divergence": "k3"}]
    config = shown_recipe(lm, tmp_path / "run", prompt_file(tmp_path), model=model, anchors=anchors, **sections)
    found, policy = estimate(config), load_language_policy(config)
    own = sum(p.numel() for p in policy.network.model.parameters())
    teacher = sum(p.numel() for p in policy.teachers["big"].model.parameters())
    trained = sum(p.numel() for p in policy.parameters.values())
    assert (found.model.trained, found.model.frozen) == (trained, own - trained + teacher)
    buffers = sum(b.nbytes for b in policy.teachers["big"].model.buffers())
    assert found.memory["teacher big"] == 4 * teacher + buffers
    assert found.memory["snapshot old"] == found.memory["gradients"] == 4 * trained
    assert ("pretrained weights, kept" in found.memory) is (model["train"] == "full")
    # 2 layers, keys and values, one head of 8 of two, 6 samples of 9 tokens, float32
    assert found.memory["keys and values of a rollout batch"] == 2 * 2 * 8 * 6 * 9 * 4


def test_flops_are_two_a_weight_forward_and_six_trained(lm: Path, tmp_path: Path) -> None:
    """The rest is attention's products of tokens with tokens, and one more pass through the head in the backward pass."""
    found = estimate(shown_recipe(lm, tmp_path / "run", prompt_file(tmp_path)))
    model = AutoModelForCausalLM.from_pretrained(lm)
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n}
    weights, head = sum(matrices.values()), matrices["lm_head.weight"]
    assert 2 * weights <= found.model.forward <= 2.3 * weights
    assert 6 * weights + 0.5 * head <= found.model.training <= 7 * weights


def test_bad_prompts_and_folders_are_found_without_weights(lm: Path, tmp_path: Path) -> None:
    path = prompt_file(tmp_path, ["1+1=", "1" * 60])
    with pytest.raises(ModelError, match=r"prompts\.txt:2: 60 tokens"):
        estimate(shown_recipe(lm, tmp_path / "run", path))
    with pytest.raises(ModelError, match=r"no folder '\./nowhere'; expected a transformers folder"):
        estimate(shown_recipe("./nowhere", tmp_path / "run", path))


def test_the_table_reads_well_at_80_columns(lm: Path, tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(estimate_table(estimate(shown_recipe(lm, tmp_path / "run", prompt_file(tmp_path)), 2)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "Qwen2ForCausalLM",
        "generated",
        "keys and values",
        "logits of a chunk",
        "FLOPs a token",
        "Not in it",
    ):
        assert words in text
    assert "…" not in text


def test_the_meta_device_does_not_leak(lm: Path, tmp_path: Path) -> None:
    estimate(shown_recipe(lm, tmp_path / "run", prompt_file(tmp_path)))
    assert torch.zeros(1).device.type == "cpu"
