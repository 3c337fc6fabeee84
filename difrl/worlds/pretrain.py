"""Pretraining of the shipped models: the autoencoder, the text-to-image model on its latents, and the judge.

`difrl pretrain configs/pretrain/tiny-sd3.yaml` runs the stages in order. Each stage checkpoints into `work` and a
stage that has finished is loaded instead of repeated, so the command can be killed and given again at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from difrl.worlds import shapes
from difrl.worlds.judge import JudgeConfig, train_judge
from difrl.worlds.tiny_sd3 import build_pipeline, encode_tokens
from difrl.worlds.training import Stage, StageConfig
from rewards import make

log = logging.getLogger(__name__)


class VaeConfig(StageConfig):
    """The autoencoder: loss = L1 + 2 MSE + kl · KL."""

    kl: float = Field(1e-3, ge=0, description="weight of the KL to the standard normal, per latent element")


class DenoiserConfig(StageConfig):
    """The text-to-image model, by flow matching with logit-normal times (arXiv:2403.03206)."""

    drop: float = Field(0.1, ge=0, lt=1, description="fraction of prompts replaced by the empty one, for guidance")
    evaluate_images: int = Field(256, ge=0, description="drawings sampled and scored at each checkpoint")
    evaluate_steps: int = Field(10, gt=0, description="denoising steps of those drawings")


class PretrainConfig(BaseModel):
    """One run of `difrl pretrain`."""

    model_config = ConfigDict(extra="forbid")

    output: Path = Field(description="folder of the finished pipeline")
    judge_output: Path = Field(description="folder of the finished judge")
    work: Path = Field(description="folder of checkpoints and of the cached drawings")
    seed: int = 0
    drawings: int = Field(gt=0, description="size of the training set")
    vae: VaeConfig
    denoiser: DenoiserConfig
    judge: JudgeConfig


def _noise(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def train_vae(vae: AutoencoderKL, images: Tensor, config: VaeConfig, seed: int, work: Path) -> None:
    """Trains the autoencoder and stores the statistics of its latents as scaling and shift factor."""

    def loss_of(step: int) -> Tensor:
        generator = _noise(seed, step)
        x = images[torch.randint(len(images), (config.batch,), generator=generator)] * 2 - 1
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return F.l1_loss(decoded, x) + 2 * F.mse_loss(decoded, x) + config.kl * kl

    Stage("vae", config, [vae], work).run(loss_of)
    with torch.no_grad():
        latents = vae.encode(images[:2048] * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    means = [vae.encode(chunk * 2 - 1).latent_dist.mean for chunk in images.split(256)]
    return (torch.cat(means) - vae.config.shift_factor) * vae.config.scaling_factor


def _token_ids(pipeline: StableDiffusion3Pipeline, texts: Sequence[str]) -> Tensor:
    return pipeline.tokenizer(list(texts), padding="max_length", return_tensors="pt").input_ids


def accuracy(pipeline: StableDiffusion3Pipeline, count: int, steps: int, seed: int) -> float:
    """The fraction of drawings, sampled without guidance for random prompts, that show what was asked."""
    prompts = shapes.sample_prompts(count, np.random.default_rng(seed))
    reward, correct = make("geneval"), 0.0
    for start in range(0, count, 64):
        chunk = prompts[start : start + 64]
        images = pipeline(
            [p.text for p in chunk],
            num_inference_steps=steps,
            guidance_scale=1.0,
            max_sequence_length=0,
            generator=torch.Generator().manual_seed(seed + start),
            output_type="pt",
        ).images
        correct += reward(images, [p.text for p in chunk], [p.metadata for p in chunk]).values.sum().item()
    return correct / count


def train_denoiser(
    pipeline: StableDiffusion3Pipeline,
    latents: Tensor,
    texts: Sequence[str],
    config: DenoiserConfig,
    seed: int,
    work: Path,
) -> None:
    """Trains the transformer and both text encoders together on latents [N, 8, 8, 8] and their prompts."""
    ids, empty = _token_ids(pipeline, texts), _token_ids(pipeline, [""])
    pipeline.set_progress_bar_config(disable=True)

    def loss_of(step: int) -> Tensor:
        generator = _noise(seed + 1, step)
        rows = torch.randint(len(latents), (config.batch,), generator=generator)
        dropped = torch.rand(config.batch, generator=generator) < config.drop
        t = torch.sigmoid(torch.randn(config.batch, generator=generator))
        x0 = latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        x_t = torch.lerp(x0, noise, t[:, None, None, None])
        embeds, pooled = encode_tokens(pipeline, torch.where(dropped[:, None], empty, ids[rows]))
        output = pipeline.transformer(x_t, embeds, pooled, t * 1000, return_dict=False)[0]
        return F.mse_loss(output.float(), noise - x0)

    def evaluate() -> str:
        return f"accuracy {accuracy(pipeline, config.evaluate_images, config.evaluate_steps, seed):.3f}"

    modules = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]
    Stage("denoiser", config, modules, work).run(loss_of, evaluate if config.evaluate_images else None)


def pretrain(config: PretrainConfig) -> None:
    """Runs every stage and writes the pipeline (float16) and the judge."""
    config.work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(config.seed)
    prompts = shapes.sample_prompts(config.drawings, rng)
    log.info("drawing %d scenes", config.drawings)
    images = shapes.draw([p.metadata for p in prompts], rng)
    pipeline = build_pipeline([p.text for p in shapes.prompts()], config.seed)
    train_vae(pipeline.vae, images, config.vae, config.seed, config.work)
    train_denoiser(
        pipeline, _encode(pipeline.vae, images), [p.text for p in prompts], config.denoiser, config.seed, config.work
    )
    pipeline.to(torch.float16).save_pretrained(config.output, safe_serialization=True)
    log.info("wrote %s", config.output)
    train_judge(config.judge, config.seed, config.work).save(config.judge_output)
    log.info("wrote %s", config.judge_output)
