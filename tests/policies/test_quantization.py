"""Frozen weights in fewer bits: their error, their bytes, adapters on them, and what they exclude."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM

from difrl.config import RunConfig
from difrl.inference.loaded_run import open_run
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.load import load_family
from difrl.policies.errors import ModelError
from difrl.policies.load import load_policy
from difrl.policies.model_paths import resolve
from difrl.policies.quantization import count_frozen_bytes
from difrl.reporting.terminal import SilentDisplay
from difrl.training import run as running
from tests.helpers import perturb
from tests.recipes import FLOW_GRPO, load_training_prompts, recipe, text_recipe

LORA = {"train": "lora", "lora": {"rank": 2}}


def build(model: Path | str, tmp_path: Path, quantize: str, **keys: Any) -> RunConfig:
    """Return a recipe for a pipeline or a language model."""
    settings = {**LORA, "quantize": quantize, **keys}
    if (Path(resolve(str(model))) / "model_index.json").exists():
        return recipe(model, tmp_path / "run", model=settings, **FLOW_GRPO)
    (tmp_path / "prompts.txt").write_text("1+2=\n3+4=\n5+5=\n9+9=\n")
    return text_recipe(model, tmp_path / "run", model=settings, data={"train": str(tmp_path / "prompts.txt")})


def evaluate(policy: Any, config: RunConfig, rollout: Any = None) -> dict[str, Tensor]:
    """Return ℓ of a rollout's decisions under θ and under the pretrained weights, with the gradient of θ's."""
    prompts = load_training_prompts(config)[:2]
    rollout = rollout or policy.rollout(prompts, torch.arange(2), torch.arange(2), NoiseKey(0, 0))
    decisions = policy.decisions(rollout, NoiseKey(0, 0))
    logp = policy.likelihoods(rollout, decisions).logp
    logp.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters.values()])
    base = policy.recompute_logprobs(rollout, decisions, snapshot="base")
    return {"logp": logp.detach(), "base": base, "gradient": gradient, "rollout": rollout}


def parts(tensor: Tensor) -> list[Tensor]:
    names = tensor.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(tensor) else []
    return [getattr(tensor, name) for name in names] or [tensor]


def output(denoiser: Any) -> Tensor:
    generator, config = torch.Generator().manual_seed(0), denoiser.config
    size = (2, config.in_channels, config.sample_size, config.sample_size)
    x, texts, pooled = (
        torch.randn(shape, generator=generator)
        for shape in (size, (2, 12, config.joint_attention_dim), (2, config.pooled_projection_dim))
    )
    with torch.no_grad():
        return denoiser(x, texts, pooled, torch.tensor([900.0, 300.0])).sample


@pytest.mark.parametrize(("quantize", "error"), [("int8", 0.006), ("float8", 0.025)])
def test_the_shipped_model_keeps_its_output(tmp_path: Path, quantize: str, error: float) -> None:
    """Measured: 0.4% (int8) and 1.7% (float8) of the output's norm."""
    expected = output(load_family(build("tiny-sd3", tmp_path, "none").model).denoiser)
    family = load_family(build("tiny-sd3", tmp_path, quantize).model)
    assert 0 < (output(family.denoiser) - expected).norm() <= error * expected.norm()
    assert {type(p) for p in family.pipeline.vae.parameters()} == {nn.Parameter}
    assert {type(p) for p in family.pipeline.text_encoder.parameters()} == {nn.Parameter}


@pytest.mark.parametrize(("quantize", "dtype"), [("int8", "float32"), ("float8", "bfloat16")])
@pytest.mark.parametrize("model", ["sd35", "lm"])
def test_bytes_are_counted_without_weights(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, quantize: str, dtype: str
) -> None:
    config = build(request.getfixturevalue(model), tmp_path, quantize, dtype=dtype)
    module, skeleton = load_policy(config).module, load_policy(config, "meta").module
    frozen = [x for x in (*module.parameters(), *module.buffers()) if not x.requires_grad and x.is_floating_point()]
    expected = sum(part.nbytes for x in frozen for part in parts(x))
    assert sum(count_frozen_bytes(skeleton, quantize).values()) == expected


@pytest.mark.parametrize(("model", "quantize"), [("sd35", "int8"), ("lm", "float8")])
def test_an_adapter_is_trained_saved_and_loaded_on_the_plain_model(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, quantize: str
) -> None:
    place = request.getfixturevalue(model)
    config = build(place, tmp_path, quantize)
    policy: Any = load_policy(config)
    first = evaluate(policy, config)
    assert torch.equal(first["logp"], first["base"])  # an adapter starts at zero
    assert first["gradient"].norm() > 0
    perturb(policy.parameters, 0.5)
    moved = evaluate(policy, config, first["rollout"])
    assert not torch.equal(moved["logp"], first["logp"])
    assert torch.equal(moved["base"], first["base"])
    policy.save(tmp_path / "model")

    warm = build(place, tmp_path, quantize, lora={"warm_start": str(tmp_path / "model")})
    again = evaluate(load_policy(warm), warm, first["rollout"])
    torch.testing.assert_close(again["logp"], moved["logp"])

    if model == "lm":
        loaded: Any = AutoModelForCausalLM.from_pretrained(place)
        loaded.load_adapter(str(tmp_path / "model"))
    else:
        pipeline = StableDiffusion3Pipeline.from_pretrained(place)
        pipeline.load_lora_weights(tmp_path / "model")
        loaded = pipeline.transformer
    found = {name: p for name, p in loaded.named_parameters() if ".lora_" in name}
    assert len(found) == len(policy.parameters)
    products = [products_of(each) for each in (found, policy.parameters)]
    assert products[0].keys() == products[1].keys()
    for name, product in products[0].items():
        torch.testing.assert_close(product, products[1][name])


def products_of(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return B A of each layer: saved adapters have their scale in the weights."""
    found = dict[str, Tensor]()
    for name, down in adapter.items():
        if ".lora_A." in name:
            up = next(p for key, p in adapter.items() if key.startswith(name.split(".lora_A.")[0] + ".lora_B."))
            found[name.split(".lora_A.")[0]] = (up @ down).detach()
    return found


@pytest.mark.parametrize(("model", "quantize"), [("sd35", "float8"), ("lm", "int8")])
def test_a_diagnosis_evaluates_in_float32_and_restores_the_weights(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, quantize: str
) -> None:
    config = build(request.getfixturevalue(model), tmp_path, quantize, dtype="bfloat16")
    policy: Any = load_policy(config)
    first = evaluate(policy, config)
    types = [type(p) for p in policy.module.parameters()]
    with policy.in_precision(torch.float32):
        exact = evaluate(policy, config, first["rollout"])
    torch.testing.assert_close(exact["logp"], first["logp"], rtol=0.1, atol=0.1)
    assert not torch.equal(exact["logp"], first["logp"])
    assert [type(p) for p in policy.module.parameters()] == types
    assert torch.equal(evaluate(policy, config, first["rollout"])["logp"], first["logp"])


@pytest.mark.parametrize("model", ["sd3", "lm"])
def test_weights_that_were_saved_quantized_load_by_themselves(
    request: pytest.FixtureRequest, tmp_path: Path, model: str
) -> None:
    """The libraries read the format from the folder, so the recipe needs no key. Such weights cannot be trained."""
    place = request.getfixturevalue(model)
    own: Any = load_policy(build(place, tmp_path, "int8"))
    folder = tmp_path / "saved"
    if model == "lm":
        AutoModelForCausalLM.from_pretrained(
            place, quantization_config=own.module.config.quantization_config
        ).save_pretrained(folder)
        for file in Path(place).glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
    else:
        shutil.copytree(place, folder)
        shutil.rmtree(folder / "transformer")
        load_family(build(place, tmp_path, "int8").model).denoiser.save_pretrained(folder / "transformer")
    config = build(folder, tmp_path, "none")
    first = evaluate(own, config)
    found = evaluate(load_policy(config), config, first["rollout"])
    assert torch.equal(found["logp"], first["logp"])
    with pytest.raises(ModelError, match=r"model.train: full trains all weights, and those of .* are quantised"):
        load_policy(build(folder, tmp_path, "none", train="full"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine with a GPU has the format")
@pytest.mark.parametrize("model", ["sd3", "lm"])
def test_nf4_needs_a_gpu(request: pytest.FixtureRequest, tmp_path: Path, model: str) -> None:
    with pytest.raises(ModelError, match=r"model.quantize: nf4 needs a GPU, and found none; set .* int8 or float8"):
        load_policy(build(request.getfixturevalue(model), tmp_path, "nf4"))


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["sd35", "lm"])
def test_nf4_on_a_gpu(request: pytest.FixtureRequest, tmp_path: Path, model: str) -> None:
    config = build(request.getfixturevalue(model), tmp_path, "nf4", dtype="bfloat16")
    policy: Any = load_policy(config, "cuda")
    first = evaluate(policy, config)
    assert torch.equal(first["logp"], first["base"])
    assert first["gradient"].norm() > 0
    skeleton: Any = load_policy(config, "meta")
    module = policy.module
    real = sum(
        x.nbytes + (x.quant_state.absmax.nbytes if hasattr(x, "quant_state") else 0)
        for x in (*module.parameters(), *module.buffers())
        if not x.requires_grad and (x.is_floating_point() or hasattr(x, "quant_state"))
    )
    assert sum(count_frozen_bytes(skeleton.module, "nf4").values()) == real


@pytest.mark.parametrize(
    ("keys", "path", "problem"),
    [
        ({"model": {"train": "full", "quantize": "int8"}}, "model.quantize", "cannot be trained"),
        ({"model": {**LORA, "quantize": "nf4", "shard": "weights"}}, "model.shard", "cannot split nf4"),
        ({"model": {**LORA, "quantize": "int8"}, "rollout": {"precision": "int8"}}, "rollout.precision", "already"),
        ({"model": {"train": "full", "offload": "weights"}}, "model.offload", "stay on the device"),
        ({"model": {**LORA, "offload": "weights", "quantize": "int8"}}, "model.offload", "stay on the device"),
        ({"model": {**LORA, "offload": "weights", "compile": True}}, "model.compile", "interrupt"),
        ({"model": {**LORA, "offload": "weights", "shard": "gradients"}}, "model.offload", "choose one"),
        ({"model": {**LORA, "offload": "weights"}, "rollout": {"precision": "int8"}}, "rollout.precision", "device"),
        ({"model": {"train": "lora", "lora": {"warm_start": "a"}, "offload": "weights"}}, "model.offload", "loads too"),
        ({"model": {"compile": True}, "rollout": {"precision": "int8"}}, "rollout.precision", "compiled again"),
        ({"model": {"shard": "weights", "compile": True}}, "model.compile", "gather"),
        ({"model": {"shard": "weights"}, "train": {"optimizer": "lion"}}, "train.optimizer", "takes whole weights"),
    ],
)
def test_settings_that_exclude_each_other(keys: dict[str, Any], path: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        recipe("tiny-sd3", **keys)
    assert path in str(caught.value)


def test_settings_of_image_models_and_of_vllm() -> None:
    with pytest.raises(ValueError, match=r"model.offload: offload is a setting of image models"):
        text_recipe("tiny-lm", model={**LORA, "offload": "weights"})
    with pytest.raises(ValueError, match=r"model.quantize: vllm receives merged weights"):
        text_recipe("tiny-lm", model={**LORA, "quantize": "int8"}, generation={"engine": "vllm"})


def test_a_run_opens_with_quantized_weights_again(sd3: Path, tmp_path: Path) -> None:
    sections = {"train": {"steps": 1, "optimizer": "adamw8bit"}, "eval": {"every": 0}}
    run = tmp_path / "run"
    running.train(recipe(sd3, run, model={**LORA, "quantize": "int8"}, **sections), display=SilentDisplay())
    opened: Any = open_run(run, device="cpu").policy
    assert "Int8Tensor" in {type(p).__name__ for p in opened.module.parameters()}
    saved = load_file(run / "model" / "pytorch_lora_weights.safetensors")
    products = [products_of({name.replace(".default", ""): p for name, p in opened.parameters.items()})]
    products.append({name.removeprefix("transformer."): p for name, p in products_of(saved).items()})
    assert products[0].keys() == products[1].keys()
    for name, product in products[0].items():
        torch.testing.assert_close(product, products[1][name])
    images = opened.evaluation(load_training_prompts(recipe(sd3))[:2], torch.arange(2), NoiseKey(0, 0)).images
    assert images.isfinite().all()
