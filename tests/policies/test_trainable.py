"""The adapter that is trained, and its description in saved files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from difrl.policies.load import load_policy
from tests.recipes import recipe, text_recipe


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
