"""The adapter that is trained, and its description in saved files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from difrl.policies.errors import ModelError
from difrl.policies.load import load_policy
from difrl.training.cost.estimate import estimate
from tests.recipes import recipe, text_recipe
from tests.texts import prompt_file
from tests.tiny_models import tiny_lm


def described_in_diffusers(folder: Path) -> list[str]:
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as weights:
        metadata: dict[str, Any] = json.loads(weights.metadata()["lora_adapter_metadata"])
    found: list[str] = metadata["transformer.target_modules"]
    return found


def described_in_peft(folder: Path) -> list[str]:
    found: list[str] = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    return found


@pytest.mark.parametrize("modality", ["images", "texts"])
def test_saved_adapters_list_their_modules_in_order(sd3: Path, lm: Path, tmp_path: Path, modality: str) -> None:
    """PEFT has them in a set, in an order that changes from process to process."""
    model = {"train": "lora", "lora": {"rank": 2}}
    config = recipe(sd3, model=model) if modality == "images" else text_recipe(lm, model=model)
    load_policy(config, "cpu").save(tmp_path)
    described = described_in_diffusers(tmp_path) if modality == "images" else described_in_peft(tmp_path)
    assert len(described) > 2
    assert described == sorted(described)


def test_an_adapter_that_gives_its_modules_as_a_pattern_keeps_it(lm: Path, tmp_path: Path) -> None:
    pattern = r".*\.(q_proj|v_proj)"
    lora = {"rank": 2, "targets": ["q_proj", "v_proj"]}
    load_policy(text_recipe(lm, model={"train": "lora", "lora": lora}), "cpu").save(tmp_path / "first")
    file = tmp_path / "first" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": pattern}))
    warm = {"rank": 2, "warm_start": str(tmp_path / "first")}
    load_policy(text_recipe(lm, model={"train": "lora", "lora": warm}), "cpu").save(tmp_path / "second")
    saved = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert saved["target_modules"] == pattern


def adapted(policy: Any) -> set[str]:
    return {name.partition(".lora_")[0] for name in policy.parameters}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["attn.to_q"], {f"transformer_blocks.{i}.attn.to_q" for i in (0, 1)}),
        (["transformer_blocks.1.attn.to_k"], {"transformer_blocks.1.attn.to_k"}),
        (["proj_out", "attn.to_out.0"], {"proj_out", *(f"transformer_blocks.{i}.attn.to_out.0" for i in (0, 1))}),
        (["context_embedder"], {"context_embedder"}),
        (["pos_embed.proj"], {"pos_embed.proj"}),
    ],
)
def test_a_target_is_a_name_or_its_end_after_a_dot(sd3: Path, targets: list[str], expected: set[str]) -> None:
    """As PEFT matches them: `to_q` is not `add_to_q`, and a full name is one module."""
    policy = load_policy(recipe(sd3, model={"train": "lora", "lora": {"rank": 2, "targets": targets}}))
    assert adapted(policy) == expected


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (["q", "attn.to_k"], r"no module is called 'q'; similar names: .*to_q"),
        (
            ["to_q", "attn.to_z", "nonsense"],
            r"'attn\.to_z'; similar names: .*attn\.to_.*no module is called 'nonsense'",
        ),
        (["o_q"], "no module is called 'o_q'; similar names: .*to_q"),
        (["attn"], r"'attn' is Attention \(transformer_blocks\.0\.attn\), .* linear layers; it holds .*to_k.*to_q"),
        (["norm1"], r"'norm1' is AdaLayerNormZero \(transformer_blocks\.0\.norm1\).*it holds linear"),
        (["transformer_blocks"], r"'transformer_blocks' is ModuleList"),
        ([".to_q"], r"no module is called '\.to_q'; similar names: .*to_q"),
        ([""], "no module is called ''"),
        (["all-linear"], "no module is called 'all-linear'"),
        (["to_q|to_k"], r"no module is called 'to_q\|to_k'"),
    ],
)
def test_every_target_that_cannot_be_adapted_is_named(sd3: Path, targets: list[str], match: str) -> None:
    config = recipe(sd3, model={"train": "lora", "lora": {"rank": 2, "targets": targets}})
    for attempt in (estimate, load_policy):
        with pytest.raises(ModelError, match=rf"model\.lora\.targets: SD3Transformer2DModel: .*{match}"):
            attempt(config)


@pytest.mark.parametrize("targets", [["q"], ["self_attn"], ["input_layernorm"], ["q_proj", "w_proj"]])
def test_targets_of_a_language_model_are_named_too(lm: Path, targets: list[str]) -> None:
    with pytest.raises(ModelError, match=rf"model\.lora\.targets: Qwen2ForCausalLM: .*'{targets[-1]}'"):
        load_policy(text_recipe(lm, model={"train": "lora", "lora": {"targets": targets}}))


@pytest.mark.parametrize(("target", "other"), [("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")])
def test_an_adapter_on_shared_weights_is_refused_where_it_is_chosen(tmp_path: Path, target: str, other: str) -> None:
    """A new run is refused; one that exists already can be opened."""
    tied = tiny_lm(tmp_path / "tied", tied=True)
    lora = {"rank": 2, "targets": ["v_proj", target]}
    config = text_recipe(
        tied,
        model={"train": "lora", "lora": lora},
        data={"train": str(prompt_file(tmp_path)), "evaluation": None},
        eval={"every": 0},
    )
    for attempt in (estimate, load_policy):
        with pytest.raises(ModelError, match=rf"targets: .*{target} shares its weights with {other}.*leave it out"):
            attempt(config)
    load_policy(config, run=tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_that_is_accepted_merges_to_the_same_logits(tmp_path: Path, tied: bool) -> None:
    targets = None if tied else ["lm_head", "embed_tokens", "q_proj", "down_proj"]
    path = tiny_lm(tmp_path / "model", tied=tied)
    model = {"train": "lora", "lora": {"rank": 2, "alpha": 6.0, "targets": targets}}
    policy = load_policy(text_recipe(path, model=model))
    generator = torch.Generator().manual_seed(3)
    for p in policy.parameters.values():
        p.data = torch.randn(p.shape, generator=generator)
    policy.save(tmp_path / "adapter")
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        expected = policy.module(input_ids=tokens).logits  # type: ignore[attr-defined]
        untouched = AutoModelForCausalLM.from_pretrained(path)
        before = untouched(input_ids=tokens).logits
        merged = PeftModel.from_pretrained(untouched, tmp_path / "adapter").merge_and_unload()
        found = merged(input_ids=tokens).logits
    assert (expected - before).abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_no_targets_at_all_are_not_the_default(sd3: Path) -> None:
    with pytest.raises(ValueError, match="targets"):
        recipe(sd3, model={"train": "lora", "lora": {"targets": []}})
