"""Folders with trained parts and a reference to their base, and the whole models that `difrl merge` writes of runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from difrl.config import RunConfig
from difrl.inference.loaded_run import open_run
from difrl.inference.merge import merge
from difrl.policies.base_reference import REFERENCE
from difrl.policies.errors import ModelError
from difrl.policies.load import load_policy
from difrl.reporting.terminal import SilentDisplay
from difrl.training import run as running
from difrl.training.cost.estimate import estimate
from tests.helpers import perturb
from tests.recipes import recipe, text_recipe

SMALL = {"data": {"prompts_per_step": 2, "group_size": 2}, "train": {"steps": 1, "lr": 3e-2}, "eval": {"every": 0}}
LORA = {"model": {"train": "lora", "lora": {"rank": 2}}}


def train(config: RunConfig) -> Path:
    running.train(config, display=SilentDisplay())
    return config.output_dir


def weights(policy: object) -> dict[str, Tensor]:
    assert isinstance(policy.module, nn.Module)  # type: ignore[attr-defined]
    return {name: p.detach().clone() for name, p in policy.module.named_parameters()}  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def base(sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(sd3, tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe(base, tmp_path_factory.mktemp("runs") / "full", **SMALL))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFRL_CACHE", str(tmp_path / "cache"))


def test_the_model_folder_of_a_run_has_only_what_was_trained(run: Path, base: Path) -> None:
    files = {str(path.relative_to(run / "model")) for path in (run / "model").rglob("*") if path.is_file()}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert files == {"base.json", "transformer/config.json", weights}
    reference = json.loads((run / "model/base.json").read_text())
    assert (reference["path"], reference["revision"], reference["trained"]) == (str(base), None, ["transformer"])
    assert reference["digests"].keys() >= {"vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler"}


def test_such_a_folder_is_opened_and_trained_on(run: Path, base: Path, tmp_path: Path) -> None:
    """As the whole model is. A model that is trained from it refers to the same base."""
    model = run / "model"
    trained, opened = open_run(run, device="cpu"), open_run(model, device="cpu", steps=4)
    one, other = (run.sample(["a red circle"]).images for run in (trained, opened))
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert estimate(recipe(model, tmp_path / "run", **SMALL)).memory == estimate(recipe(base, tmp_path, **SMALL)).memory
    following = train(recipe(model, tmp_path / "run", **SMALL))
    assert json.loads((following / "model/base.json").read_text()) == json.loads((model / REFERENCE).read_text())
    merge(str(following / "model"), tmp_path / "whole")
    whole = StableDiffusion3Pipeline.from_pretrained(tmp_path / "whole", text_encoder_3=None, tokenizer_3=None)
    expected = weights(open_run(following, device="cpu").policy)
    assert all(torch.equal(p, expected[name]) for name, p in whole.transformer.named_parameters())


def test_a_base_that_is_gone_or_changed_is_reported(run: Path, base: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    model = Path(shutil.copytree(run / "model", tmp_path / "model"))
    reference = json.loads((model / REFERENCE).read_text())

    def refer(path: object) -> None:
        (model / REFERENCE).write_text(json.dumps({**reference, "path": str(path)}))

    refer(moved)
    open_run(model, device="cpu")
    weights_file = moved / "vae/diffusion_pytorch_model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(
        ModelError, match=r"belongs to the model .*moved, whose vae is not as it was when the run ended"
    ):
        open_run(model, device="cpu")
    shutil.rmtree(moved)
    with pytest.raises(ModelError, match=r"only trained parts, and its base .*moved is not there; .*base\.json"):
        open_run(model, device="cpu")
    refer("nobody/nothing")
    with pytest.raises(ModelError, match=r"its base nobody/nothing cannot be fetched from the hub"):
        open_run(model, device="cpu")
    (model / REFERENCE).write_text("{}")
    with pytest.raises(ModelError, match=r"base\.json cannot be read .*expected the path, revision"):
        open_run(model, device="cpu")
    refer(base)
    shutil.rmtree(model / "transformer")
    with pytest.raises(ModelError, match=r"has no transformer, which base\.json names"):
        open_run(model, device="cpu")


def test_whole_folders_of_earlier_runs_open_as_before(run: Path, tmp_path: Path) -> None:
    merge(str(run), tmp_path / "run/model")
    one, other = open_run(tmp_path / "run/model", device="cpu"), open_run(run, device="cpu")
    found, expected = weights(one.policy), weights(other.policy)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_folder_that_holds_something_is_not_written_to(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(ModelError, match="out is not empty"):
        merge(str(run), tmp_path / "out")


def test_an_adapter_is_merged_in_the_precision_of_the_run(sd3: Path, tmp_path: Path) -> None:
    """W + ΔW, rounded once to bfloat16; the autoencoder too, which the run holds in float32."""
    model = {"model": {"dtype": "bfloat16", **LORA["model"]}}
    config = recipe(sd3, tmp_path / "run", **{**SMALL, **model, "train": {"steps": 1, "lr": 3e-1}})
    merge(str(train(config)), tmp_path / "whole")
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "whole", text_encoder_3=None, tokenizer_3=None, dtype=torch.bfloat16
    )
    saved = {part for part in (tmp_path / "whole").iterdir() if part.is_dir()}
    assert {"transformer", "vae", "text_encoder"} <= {part.name for part in saved}
    adapted = open_run(tmp_path / "run", device="cpu").policy.module
    merged, changed = dict(pipeline.transformer.named_parameters()), 0
    for name, layer in adapted.named_modules():
        if hasattr(layer, "get_delta_weight"):
            plain = layer.get_base_layer().weight  # type: ignore[operator]
            expected = (plain.float() + layer.get_delta_weight("default").float()).bfloat16()  # type: ignore[operator]
            torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=2**-7, atol=0)
            changed += int((merged[f"{name}.weight"] != plain).sum())
    assert changed
    assert {p.dtype for part in (pipeline.transformer, pipeline.vae) for p in part.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("sections", [{}, LORA], ids=["full", "lora"])
def test_language_models_are_merged(lm: Path, tmp_path: Path, sections: dict[str, object]) -> None:
    """from_pretrained gives the distributions of the trained model, and its tokenizer."""
    policy = load_policy(text_recipe(lm, tmp_path / "run", **sections))
    tokens = torch.tensor([[3, 12, 4, 13]])
    with torch.no_grad():
        before = policy.module(tokens).logits
        perturb(policy.parameters)
        expected = policy.module(tokens).logits
        policy.merge(tmp_path / "whole")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "whole")(["1+2="])["input_ids"] == [tokens[0].tolist()]


def test_an_adapter_of_a_quantized_run_is_merged_into_the_plain_weights(lm: Path, tmp_path: Path) -> None:
    """In the run ΔW is added to rounded weights, of which from_pretrained knows nothing."""
    pytest.importorskip("torchao")
    (tmp_path / "prompts.txt").write_text("1+2=\n30+4=\n")
    data = {"train": str(tmp_path / "prompts.txt"), "prompts_per_step": 2, "group_size": 2}
    model = {**LORA["model"], "quantize": "int8"}
    config = text_recipe(
        lm, tmp_path / "run", data=data, model=model, train={"steps": 1, "lr": 1e-12}, eval={"every": 0}
    )
    merge(str(train(config)), tmp_path / "whole")
    whole, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "whole", lm))
    assert not hasattr(whole.config, "quantization_config")
    expected = dict(plain.named_parameters())
    assert all(p.dtype == expected[name].dtype for name, p in whole.named_parameters())
    with torch.no_grad():
        assert max(float((p - expected[name]).abs().max()) for name, p in whole.named_parameters()) < 1e-8
