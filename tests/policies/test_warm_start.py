"""Runs that continue from an adapter: all of it is used, kept and saved, and one that does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from difrl.config import RunConfig
from difrl.data.prompts import Prompt
from difrl.inference.loaded_run import open_run
from difrl.policies import warm_start
from difrl.policies.base import NoiseKey
from difrl.policies.errors import ModelError
from difrl.policies.load import load_policy
from difrl.reporting.terminal import SilentDisplay
from difrl.training import run as running
from difrl.training.checkpoint import find_latest
from difrl.training.cost.estimate import estimate
from samplers import keyed
from tests.recipes import recipe, text_recipe
from tests.texts import prompt_file

TEXTS = ["a red circle", "two blue squares"]
RANK, ALPHA = 4, 12
FILE = "pytorch_lora_weights.safetensors"
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, p in module.named_parameters():
        if ".lora_" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)


@pytest.fixture(scope="module")
def images(sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the denoiser and of the first text encoder, with alpha = 3 rank, as diffusers writes it."""
    folder = tmp_path_factory.mktemp("adapters") / "images"
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3, **NO_T5)
    parts = {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder}
    for part, targets in zip(parts.values(), (["to_q", "to_k"], ["q_proj"]), strict=True):
        part.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
        randomise(part)
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(part) for name, part in parts.items()}
    StableDiffusion3Pipeline.save_lora_weights(folder, **layers, **_collate_lora_metadata(parts))
    return folder


@pytest.fixture(scope="module")
def texts(lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "texts"
    network = AutoModelForCausalLM.from_pretrained(lm)
    network.add_adapter(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    randomise(network)
    network.save_pretrained(folder)
    return folder


def image_recipe(sd3: Path, adapter: Path | str, folder: Path | str = "runs/test", **lora: Any) -> RunConfig:
    model = {"train": "lora", "lora": {"warm_start": str(adapter), **lora}}
    return recipe(sd3, folder, model=model, data={"prompts_per_step": 2, "group_size": 2})


def language_recipe(lm: Path, adapter: Path | str, prompts: Path, **lora: Any) -> RunConfig:
    return text_recipe(
        lm,
        model={"train": "lora", "lora": {"warm_start": str(adapter), **lora}},
        data={"train": str(prompts), "evaluation": None},
        eval={"every": 0},
    )


def drawn_by_diffusers(sd3: Path, adapter: Path) -> Tensor:
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3, **NO_T5)
    pipeline.load_lora_weights(adapter)
    drawn = pipeline(
        TEXTS,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=0,
        latents=keyed((4, 4, 4), seed=0, step=0, samples=torch.arange(2), use="eval/init"),
        output_type="pt",
    )
    found: Tensor = drawn.images
    return found


def drawn_by(policy: Any) -> Tensor:
    prompts = [Prompt(text, {}) for text in TEXTS]
    found: Tensor = policy.evaluation(prompts, torch.arange(2), NoiseKey(0, 0, "eval")).images
    return found


def test_the_text_encoders_part_is_used_and_saved(
    sd3: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that part, or at another strength, the images of diffusers would differ.

    The files of the model do not have these encoders, so they are not dropped, and the cache on the disk is not theirs.
    """
    monkeypatch.setenv("DIFRL_CACHE", str(tmp_path / "cache"))
    load_policy(recipe(sd3)).encode_prompts([Prompt(text, {}) for text in TEXTS])
    policy = load_policy(image_recipe(sd3, images))
    policy.encode_prompts([Prompt(text, {}) for text in TEXTS])
    policy.save(tmp_path)
    expected = drawn_by_diffusers(sd3, images)
    torch.testing.assert_close(drawn_by(policy), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn_by_diffusers(sd3, tmp_path), expected, rtol=0, atol=1e-4)
    alone = tmp_path / "denoiser"
    alone.mkdir()
    save_file({k: v for k, v in load_file(tmp_path / FILE).items() if k.startswith("transformer")}, alone / FILE)
    assert (drawn_by_diffusers(sd3, alone) - expected).abs().max() > 1e-2
    # The text encoder is not trained.
    assert all(name.startswith("transformer_blocks") for name in policy.parameters)
    assert not any(p.requires_grad for p in policy.family.pipeline.text_encoder.parameters())  # type: ignore[attr-defined]


def test_a_saved_adapter_has_its_strength_without_the_header(sd3: Path, images: Path, tmp_path: Path) -> None:
    """Readers that know no metadata, such as kohya's, add B A to a weight: with alpha = rank that is all of the adapter."""
    policy = load_policy(image_recipe(sd3, images))
    policy.save(tmp_path)
    tensors = load_file(tmp_path / FILE)
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(tensors, bare / FILE)
    torch.testing.assert_close(drawn_by_diffusers(sd3, bare), drawn_by_diffusers(sd3, images), rtol=0, atol=1e-4)
    for part in ("denoiser", "pipeline.text_encoder"):
        module, prefix = policy.family, part.rpartition(".")[2].replace("denoiser", "transformer")  # type: ignore[attr-defined]
        for step in part.split("."):
            module = getattr(module, step)
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
        assert len(layers) > 1
        for name, layer in layers.items():
            a, b = (tensors[f"{prefix}.{name}.lora_{x}.weight"] for x in "AB")
            torch.testing.assert_close(b @ a, layer.get_delta_weight("default"))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        ({"rank": 8}, r"model\.lora\.rank: found 8, and the adapter .* has 4.*remove rank"),
        ({"rank": 16}, r"model\.lora\.rank: found 16"),
        ({"alpha": 4.0}, r"model\.lora\.alpha: found 4, and the adapter .* has 12"),
        ({"targets": ["attn.to_q"]}, r"model\.lora\.targets: found .*on other modules"),
    ],
)
def test_settings_that_the_adapter_does_not_have_are_refused(
    sd3: Path, images: Path, lora: dict[str, Any], match: str
) -> None:
    config = image_recipe(sd3, images, **lora)
    for attempt in (load_policy, estimate):
        with pytest.raises(ModelError, match=match):
            attempt(config)


def test_settings_that_the_adapter_has_may_be_repeated(
    sd3: Path, images: Path, lm: Path, texts: Path, tmp_path: Path
) -> None:
    load_policy(image_recipe(sd3, images, rank=RANK, alpha=float(ALPHA), targets=["attn.to_q", "to_k"]))
    estimate(language_recipe(lm, texts, prompt_file(tmp_path), rank=RANK, targets=["q_proj", "v_proj"]))


def test_full_training_has_no_adapter_to_continue_from(sd3: Path, images: Path) -> None:
    with pytest.raises(ValueError, match=r"warm_start: train: full trains all weights"):
        recipe(sd3, model={"train": "full", "lora": {"warm_start": str(images)}})


def test_the_cost_counts_the_adapters_own_parameters(sd3: Path, images: Path) -> None:
    """4 projections of 16 × 16 with two factors of rank 4."""
    model = estimate(image_recipe(sd3, images)).model
    assert model.trained == 4 * 2 * 16 * RANK
    assert model.notes == ["the adapter's part for text_encoder is active and stays as it is"]


def wrong(kind: str, folder: Path, images: Path, texts: Path, model: Path) -> Path:
    """Make what a user may give in the place of an adapter's folder."""
    own, other = (images, texts) if (model / "model_index.json").is_file() else (texts, images)
    if kind == "whole model":
        return model
    if kind == "other kind":
        return other
    if kind == "run":
        (folder / "config.yaml").write_text("seed: 0")
        shutil.copytree(own, folder / "model")
        return folder
    place = folder / "adapter"
    if kind == "empty folder":
        place.mkdir()
        return place
    shutil.copytree(own, place)
    (file,) = place.glob("*.safetensors")
    if kind == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000\n")
    elif kind == "no LoRA":
        save_file({"transformer.weight": torch.ones(3)}, file)
    elif kind == "wider":
        wide = {k: v.repeat(*[2] * v.dim()) for k, v in load_file(file).items()}
        save_file(wide, file)
    elif kind == "deeper":
        more = {k.replace(".0.", ".7."): v for k, v in load_file(file).items()}
        save_file({**load_file(file), **more}, file)
    elif kind == "two adapters":
        shutil.copy(file, place / "a.safetensors")
        file.rename(place / "b.safetensors")
    return place


WRONG = {
    "whole model": "it is a whole model, which model.path takes",
    "other kind": "adapter for a model of the other kind|one side only",
    "run": "it is the folder of a run, whose result is .*model",
    "empty folder": "has no .*expected the folder of a LoRA of",
    "cut off": "is damaged or cut off",
    "pointer": "is a pointer of git-lfs",
    "no LoRA": "cannot be loaded|one side only",
    "wider": "cannot be loaded|one side only",
    "deeper": "cannot be loaded|one side only",
    "two adapters": r"several adapters \(a\.safetensors, b\.safetensors\)|has no adapter_model",
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("modality", ["images", "texts"])
def test_what_is_no_adapter_for_the_model_is_refused_by_name(
    sd3: Path, lm: Path, images: Path, texts: Path, tmp_path: Path, kind: str, modality: str
) -> None:
    """`difrl check` and the run itself give the same message."""
    model = sd3 if modality == "images" else lm
    place = wrong(kind, tmp_path, images, texts, model)
    config = image_recipe(sd3, place) if model == sd3 else language_recipe(lm, place, prompt_file(tmp_path))
    for attempt in (estimate, load_policy):
        with pytest.raises(ModelError, match=rf"model\.lora\.warm_start: .*({WRONG[kind]})"):
            attempt(config)


def test_a_run_keeps_the_adapter_that_it_started_from(sd3: Path, images: Path, tmp_path: Path) -> None:
    """It can be sampled and resumed when the adapter is gone. The result has the strength of training."""
    adapter, folder = tmp_path / "adapter", tmp_path / "run"
    shutil.copytree(images, adapter)
    config = image_recipe(sd3, adapter, folder)
    running.train(config, display=SilentDisplay())
    before = drawn_by(open_run(folder, device="cpu").policy)
    torch.testing.assert_close(before, drawn_by_diffusers(sd3, folder / "model"), rtol=0, atol=1e-4)
    shutil.rmtree(adapter)
    assert torch.equal(drawn_by(open_run(folder, device="cpu").policy), before)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
    running.train(longer, resume=True, display=SilentDisplay())
    latest = find_latest(folder)
    assert latest is not None
    assert latest.name == "step-000004"

    # A finished run of an earlier version has no copy, and its result has the adapter's own alpha in its header.
    shutil.rmtree(folder / "warm-start")
    shutil.rmtree(folder / "model")
    shutil.copytree(images, folder / "model")
    resumed = drawn_by(open_run(folder, device="cpu", step=3).policy)
    assert torch.equal(resumed, before)


def test_an_adapter_of_the_hub_is_kept_too(
    sd3: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is fetched without the folders beside it."""
    config = image_recipe(sd3, "owner/adapter", tmp_path / "run")
    for attempt in (estimate, load_policy):
        with pytest.raises(
            ModelError, match="'owner/adapter' is not a local folder, and cannot be fetched from the hub"
        ):
            attempt(config)

    def fetch(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (name, ignore_patterns) == ("owner/adapter", ["*/*"])
        assert FILE in allow_patterns
        return str(images)

    monkeypatch.setattr(warm_start, "snapshot_download", fetch)
    expected = drawn_by(load_policy(config))
    warm_start.keep_warm_start(config)
    monkeypatch.undo()
    assert torch.equal(drawn_by(load_policy(config, run=tmp_path / "run")), expected)


def test_a_text_run_keeps_the_adapter_that_it_started_from(lm: Path, texts: Path, tmp_path: Path) -> None:
    adapter, folder = tmp_path / "adapter", tmp_path / "run"
    shutil.copytree(texts, adapter)
    config = language_recipe(lm, adapter, prompt_file(tmp_path)).model_copy(update={"output_dir": folder})
    running.train(config, display=SilentDisplay())
    shutil.rmtree(adapter)
    opened = open_run(folder, device="cpu")
    latest = find_latest(folder)
    assert latest is not None
    exact = load_file(latest / "trained.safetensors")
    assert all(torch.equal(p, exact[name]) for name, p in opened.policy.parameters.items())
    saved = json.loads((folder / "model" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (RANK, ALPHA)
