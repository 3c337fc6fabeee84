"""Pretraining of images: losses by hand, the tokenizer, the shared autoencoder, and killed runs that end like whole ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from difrl.config.load import read_model
from difrl.pretraining import tiny_sd
from difrl.pretraining.images import ARCHITECTURES, ImagesConfig, build_family, denoising_loss, pretrain_images
from difrl.pretraining.pretrain import MODEL_KINDS
from difrl.pretraining.tiny_parts import build_tokenizer
from difrl.runtime.paths import asset, recipes_folder
from difrl.tasks import shapes
from samplers import FlowMatching, VariancePreserving, corrupt

TEXTS = [p.text for p in shapes.prompts()]


def draws(count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = torch.randn(3, count, 2, 2, 2, generator=generator)
    return x0, noise, output


def test_tokenizer_is_the_same_each_time_and_makes_a_token_of_every_word() -> None:
    """Without a fixed order the trainer's hash map numbers words differently in two calls of one process."""
    tokenizers = [build_tokenizer(TEXTS) for _ in range(3)]
    vocabularies = [t.get_vocab() for t in tokenizers]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]
    words = sorted({word for text in TEXTS for word in text.split()})
    assert {len(tokenizers[0](word).input_ids) for word in words} == {3}  # beginning, word, end


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_encodes_prompts_as_the_family_does(name: str) -> None:
    architecture = ARCHITECTURES[name]
    pipeline = architecture.build([p.text for p in architecture.task.prompts], 0)
    family = build_family(pipeline)
    text = architecture.task.prompts[0].text
    ids = pipeline.tokenizer([text], padding="max_length", return_tensors="pt").input_ids
    tokens = ids.shape[1] if name == "tiny-wan" else None  # other families have a length of their own
    found, expected = architecture.encode(pipeline, ids), family.encode_prompt(text, None, tokens)
    assert found.keys() == {name for name in expected if not name.endswith(".shape")}
    for key in found:
        torch.testing.assert_close(found[key], expected[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_calls_the_denoiser_as_the_family_does_with_gradients_of_the_encoders(name: str) -> None:
    architecture = ARCHITECTURES[name]
    pipeline = architecture.build([p.text for p in architecture.task.prompts], 0)
    family = build_family(pipeline).with_inputs(architecture.inputs)
    for module in architecture.trained(pipeline):  # outputs begin as zero
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.05)
    ids = pipeline.tokenizer(
        [architecture.task.prompts[0].text] * 2, padding="max_length", return_tensors="pt"
    ).input_ids
    generator = torch.Generator().manual_seed(0)
    x_t, timestep = torch.randn(2, *family.latent_shape(), generator=generator), torch.tensor([200.0, 700.0])
    condition = architecture.encode(pipeline, ids)
    output = architecture.call(pipeline, x_t, timestep, condition)
    with torch.no_grad():
        torch.testing.assert_close(output, family.call(x_t, timestep, condition), atol=1e-5, rtol=1e-5)
    output.square().mean().backward()
    for module in architecture.trained(pipeline):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_videos_of_the_task_are_encoded_and_decoded() -> None:
    """Latents that were normalised have a mean of 0 and a spread of 1 in every channel."""
    architecture = ARCHITECTURES["tiny-wan"]
    pipeline = architecture.build([p.text for p in architecture.task.prompts], 0)
    family = build_family(pipeline).with_inputs(architecture.inputs)
    videos = architecture.task.draw([p.metadata for p in architecture.task.prompts[:4]], np.random.default_rng(0))
    with torch.no_grad():
        architecture.normalise(pipeline.vae, pipeline.vae.encode(architecture.to_vae(videos)).latent_dist.mean)
    latents = build_family(pipeline).with_inputs(architecture.inputs).encode_images(videos)
    assert latents.shape == (4, *family.latent_shape()) == (4, 8, 3, 8, 8)
    torch.testing.assert_close(latents.transpose(0, 1).flatten(1).std(1), torch.ones(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.transpose(0, 1).flatten(1).mean(1), torch.zeros(8), atol=1e-4, rtol=0)
    assert family.decode(latents).shape == videos.shape


def shipped_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(asset("tiny-sd"), subfolder="vae", dtype=torch.float32)


@pytest.mark.parametrize("build", [tiny_sd.build_vae, shipped_vae])
def test_autoencoder_without_shift_is_tiny_sd3s(build: Callable[[], AutoencoderKL]) -> None:
    """The shift of 0.014 is off by at most 7e-6 in float16."""
    shifted = AutoencoderKL.from_pretrained(asset("tiny-sd3"), subfolder="vae", dtype=torch.float32)
    scale, shift = shifted.config.scaling_factor, shifted.config.shift_factor
    vae = build()
    assert vae.config.shift_factor is None
    assert vae.config.scaling_factor == scale
    images = 2 * torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        latents = (shifted.encode(images).latent_dist.mean - shift) * scale
        posterior = vae.encode(images).latent_dist
        torch.testing.assert_close(posterior.mean * scale, latents, atol=1e-5, rtol=0)
        torch.testing.assert_close(posterior.std, shifted.encode(images).latent_dist.std, atol=1e-5, rtol=0)
        expected = shifted.decode(latents / scale + shift).sample
        torch.testing.assert_close(vae.decode(latents / scale).sample, expected, atol=1e-5, rtol=0)


def test_unweighted_loss_is_the_mean_squared_error_of_the_target() -> None:
    x0, noise, output = draws()
    t = torch.tensor([0.2, 0.5, 0.9])
    flow = denoising_loss(FlowMatching(), output, x0, noise, t, None)
    torch.testing.assert_close(flow, ((output - (noise - x0)) ** 2).mean())
    epsilon = VariancePreserving(DDIMScheduler().alphas_cumprod, "epsilon")
    torch.testing.assert_close(denoising_loss(epsilon, output, x0, noise, t, None), ((output - noise) ** 2).mean())


def test_weighted_loss_is_min_snr_weighting_of_the_noise_with_a_floor() -> None:
    """clip(SNR, 0.5, 2)/SNR times the squared error of the noise, at SNR = 9, 1 and 1/9."""
    table = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    process = VariancePreserving(table, "epsilon")
    x0, noise, output = draws()
    t = torch.tensor([1 / 3, 2 / 3, 1.0])
    error = ((output - noise) ** 2).mean((1, 2, 3))
    expected = (error * torch.tensor([2 / 9, 1.0, 4.5])).mean()
    torch.testing.assert_close(denoising_loss(process, output, x0, noise, t, (0.5, 2.0)), expected, rtol=1e-4, atol=0)


def test_perfect_output_has_no_loss() -> None:
    process = VariancePreserving(tiny_sd.build_scheduler().alphas_cumprod, "epsilon")
    x0, noise, _ = draws()
    t = torch.tensor([0.02, 0.5, 0.98])
    assert corrupt(process, x0, noise, t).shape == x0.shape
    assert denoising_loss(process, noise, x0, noise, t, (0.1, 5.0)) < 1e-6


def config(folder: Path, steps: int, **more: Any) -> ImagesConfig:
    denoiser = {"steps": steps, "batch": 4, "lr": 1e-3, "times": "uniform", "evaluate_images": 0, "checkpoint_every": 2}
    return ImagesConfig.model_validate(
        {
            "architecture": "tiny-sd",
            "output": folder / "out",
            "work": folder / "work",
            "drawings": 8,
            "denoiser": {**denoiser, **more},
        }
    )


@pytest.mark.slow
def test_killed_and_given_again_ends_with_the_same_model(tmp_path: Path) -> None:
    pretrain_images(config(tmp_path / "whole", 4))
    pretrain_images(
        config(tmp_path / "parts", 2)
    )  # its checkpoint is the one a run killed after two steps leaves behind
    pretrain_images(config(tmp_path / "parts", 4))
    whole, parts = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name / "out").rglob("*.*")}
        for name in ("whole", "parts")
    ]
    assert whole == parts
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "whole" / "out")
    assert pipeline.unet.dtype == torch.float32  # the files are float16
    assert sum(path.stat().st_size for path in (tmp_path / "whole" / "out").rglob("*.safetensors")) < 6e6


@pytest.mark.parametrize("name", MODEL_KINDS)
def test_shipped_pretraining_recipe_makes_the_shipped_model(name: str) -> None:
    found: Any = read_model(MODEL_KINDS[name].config, recipes_folder() / "pretrain" / f"{name}.yaml", [])
    assert found.architecture == name
    assert found.output == Path("difrl/assets") / name
