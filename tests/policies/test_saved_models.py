"""Fully trained models that are saved in half-precision runs, as diffusers and transformers load them by default."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from difrl.policies.diffusion.families.unscaled_lora import sort_header
from difrl.policies.load import load_policy
from tests.recipes import recipe, text_recipe
from tests.tiny_models import tiny_sd

BFLOAT16 = {"train": "full", "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.mark.parametrize("model", ["sd3", "sd35", "sd"])
def test_a_pipeline_loads_without_a_dtype(request: pytest.FixtureRequest, tmp_path: Path, model: str) -> None:
    """Its parts have one type, the trained weights their bits, and it draws. The run goes on as before."""
    policy = load_policy(recipe(request.getfixturevalue(model), model=BFLOAT16))
    family = policy.family  # type: ignore[attr-defined]
    with family.encoders.at_hand("cpu"):
        parts = family.pipeline.components
    before = {
        (name, key): (p.dtype, p.clone())
        for name, part in parts.items()
        if isinstance(part, nn.Module)
        for key, p in part.named_parameters()
    }
    assert {dtype for dtype, _ in before.values()} == {torch.float32, torch.bfloat16}
    policy.merge(tmp_path)
    for (name, key), (dtype, p) in before.items():
        after = parts[name].get_parameter(key)
        assert after.dtype == dtype
        assert torch.equal(after, p)
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None} if model == "sd3" else {}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, **without_t5)
    loaded = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    assert {p.dtype for part in loaded.values() for p in part.parameters()} == {torch.float32}
    for (name, key), (_, p) in before.items():
        assert torch.equal(loaded[name].get_parameter(key), p.float())
    images = pipeline(["a red circle"], num_inference_steps=2, output_type="pt").images
    assert images.isfinite().all()


def test_a_language_model_loads_without_a_dtype(lm: Path, tmp_path: Path) -> None:
    policy = load_policy(text_recipe(lm, model=BFLOAT16))
    policy.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(loaded.get_parameter(name), p) for name, p in policy.parameters.items())
    assert loaded(input_ids=torch.tensor([[2, 3]])).logits.isfinite().all()


def test_the_header_of_an_adapter_has_one_order(tmp_path: Path) -> None:
    """safetensors writes the entries in the order of a hash map; escapes and other alphabets keep their length."""
    entries, tensors = {"format": "pt", "b": 'a "quoted"\nü', "a": "1"}, {"weight": torch.arange(3.0)}
    written = set()
    for number in range(8):
        file = tmp_path / f"{number}.safetensors"
        save_file(tensors, file, metadata=entries)
        sort_header(file)
        written.add(file.read_bytes())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == entries
        assert torch.equal(opened.get_tensor("weight"), tensors["weight"])
    assert len(written) == 1
