"""Pretraining of the shipped image and video models: the autoencoder, the denoiser on its latents, and the judge.

Each architecture has a module of its own (difrl/pretraining/tiny_sd3.py, tiny_sd.py, tiny_wan.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from difrl.config.schema.base import FolderPath
from difrl.policies.diffusion.families import Family, find_family
from difrl.policies.tokenizer_state import remember_padding
from difrl.pretraining import tiny_sd, tiny_sd3, tiny_wan
from difrl.pretraining.judge import JudgeStageConfig, train_judge
from difrl.pretraining.stages import Stage, StageConfig
from difrl.runtime.progress import count_done, phase
from difrl.tasks import moving_shapes, shapes
from rewards import make, score
from samplers import Condition, Process, Window, corrupt, keyed, ode, rollout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """Prompts, drawings of them, and the reward that recognises a right drawing."""

    prompts: Sequence[shapes.ShapesPrompt]
    sample: Callable[[int, np.random.Generator], list[shapes.ShapesPrompt]]
    draw: Callable[[Sequence[Mapping[str, Any]], np.random.Generator], Tensor]
    """Metadata of B prompts -> images [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1]."""
    reward: str


SHAPES = Task(shapes.ALL_PROMPTS, shapes.sample_prompts, shapes.draw_images, "geneval")
MOVING_SHAPES = Task(moving_shapes.ALL_PROMPTS, moving_shapes.sample_prompts, moving_shapes.draw_videos, "motion")


def _store_shift(vae: Any, latents: Tensor) -> None:
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


@dataclass(frozen=True)
class Architecture:
    """Functions of a tiny model that its family does not have, and the task that it learns."""

    build: Callable[[Sequence[str], int], DiffusionPipeline]
    """(texts, seed) -> the untrained pipeline."""
    trained: Callable[[DiffusionPipeline], list[nn.Module]]
    """Pipeline -> the modules that the denoiser stage trains."""
    encode: Callable[[DiffusionPipeline, Tensor], dict[str, Tensor]]
    """(pipeline, token ids [B, L]) -> the denoiser's condition, with gradients."""
    call: Callable[[DiffusionPipeline, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    """(pipeline, states, timesteps, condition) -> the denoiser's output. A family's call has no gradient of the condition."""
    task: Task = SHAPES
    inputs: Mapping[str, int] = field(default_factory=dict)
    """Inputs of the pipeline, such as the number of frames."""
    to_vae: Callable[[Tensor], Tensor] = lambda images: images * 2 - 1
    """Drawings -> input of the autoencoder, in [-1, 1]."""
    normalise: Callable[[Any, Tensor], None] = _store_shift
    """(autoencoder, latents) -> None: store the mean and the spread of latents in the autoencoder."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "tiny-sd3": Architecture(
        tiny_sd3.build_pipeline, tiny_sd3.trained_modules, tiny_sd3.encode_tokens, tiny_sd3.call_denoiser
    ),
    "tiny-sd": Architecture(
        tiny_sd.build_pipeline, tiny_sd.trained_modules, tiny_sd.encode_tokens, tiny_sd.call_denoiser
    ),
    "tiny-wan": Architecture(
        tiny_wan.build_pipeline,
        tiny_wan.trained_modules,
        tiny_wan.encode_tokens,
        tiny_wan.call_denoiser,
        MOVING_SHAPES,
        {"num_frames": moving_shapes.FRAMES, "height": shapes.SIZE, "width": shapes.SIZE},
        tiny_wan.to_vae,
        tiny_wan.normalise_latents,
    ),
}

TIMES: Mapping[str, Callable[[int, torch.Generator], Tensor]] = {
    "uniform": lambda count, generator: torch.rand(count, generator=generator),
    "logit_normal": lambda count, generator: torch.sigmoid(torch.randn(count, generator=generator)),
}
"""Densities of the training times. Logit-normal is SD3's (arXiv:2403.03206)."""


DECODER_NOISE = 77
"""Place in the sequence of random numbers at which the decoder's training starts."""


class VaeConfig(StageConfig):
    """The autoencoder, with loss L1 + 2 MSE + kl · KL."""

    kl: float = Field(1e-3, ge=0, description="weight of the KL to the standard normal, per latent element")


class DenoiserConfig(StageConfig):
    """The denoiser, trained on the target of its process."""

    times: Literal["uniform", "logit_normal"] = Field(description="density of the training times")
    snr_weight: tuple[float, float] | None = Field(
        None, description="bounds of the SNR that weights the error of the clean sample; null weights the target's by 1"
    )
    drop: float = Field(0.1, ge=0, lt=1, description="fraction of prompts replaced by the empty one, for guidance")
    lengths: tuple[int, ...] = Field(
        (),
        description="numbers of tokens to which prompts are padded, one of them in each step; [] is the tokenizer's own",
    )
    evaluate_images: int = Field(256, ge=0, description="drawings sampled and scored at each checkpoint")
    evaluate_steps: int = Field(10, gt=0, description="denoising steps of those drawings")


class ImagesConfig(BaseModel):
    """A text-to-image or text-to-video model of a task of shapes. Stages that are left out do not run."""

    model_config = ConfigDict(extra="forbid")

    architecture: Literal["tiny-sd3", "tiny-sd", "tiny-wan"] = Field(description="which tiny model is made")
    output: FolderPath = Field(description="folder of the finished pipeline")
    work: FolderPath = Field(description="folder of checkpoints and of the cached drawings")
    seed: int = 0
    drawings: int = Field(gt=0, description="size of the training set")
    vae: VaeConfig | None = None
    decoder: StageConfig | None = Field(None, description="the decoder alone after that, which changes no latent")
    denoiser: DenoiserConfig
    judge: JudgeStageConfig | None = None


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def train_vae(architecture: Architecture, vae: Any, images: Tensor, config: VaeConfig, seed: int, work: Path) -> None:
    """Train the autoencoder on drawings [N, ...], and store mean and spread of its latents."""

    def compute_loss(step: int) -> Tensor:
        generator = _generator(seed, step)
        x = architecture.to_vae(images[torch.randint(len(images), (config.batch,), generator=generator)])
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss: Tensor = F.l1_loss(decoded, x) + 2 * F.mse_loss(decoded, x) + config.kl * kl
        return loss

    Stage("vae", config, [vae], work).run(compute_loss)
    with torch.no_grad():
        latents = vae.encode(architecture.to_vae(images[:2048])).latent_dist.mean
    architecture.normalise(vae, latents)


def train_decoder(
    architecture: Architecture, vae: Any, images: Tensor, config: StageConfig, seed: int, work: Path
) -> None:
    """Train the decoder of a trained autoencoder on drawings [N, ...], with loss L1 + 2 MSE on samples of the posterior."""

    def compute_loss(step: int) -> Tensor:
        generator = _generator(seed, DECODER_NOISE + step)
        x = architecture.to_vae(images[torch.randint(len(images), (config.batch,), generator=generator)])
        with torch.no_grad():
            posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        loss: Tensor = F.l1_loss(decoded, x) + 2 * F.mse_loss(decoded, x)
        return loss

    Stage("decoder", config, [vae.decoder, vae.post_quant_conv], work).run(compute_loss)


def build_family(pipeline: DiffusionPipeline) -> Family:
    """Build the family of a pipeline."""
    cls = find_family({**pipeline.config, "_class_name": type(pipeline).__name__})
    assert cls is not None
    return cls(pipeline)


@torch.no_grad()
def measure_accuracy(family: Family, task: Task, count: int, steps: int, seed: int, tokens: int | None) -> float:
    """Return the mean reward of drawings, sampled by the ODE without guidance for random prompts of so many tokens."""
    prompts = task.sample(count, np.random.default_rng(seed))
    process, shape, grid = family.process, family.latent_shape(), family.build_grid(steps)

    def denoiser(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return family.call(x_t, process.timestep(t).float(), condition.tensors)

    def sample(texts: list[str], rows: Tensor) -> Tensor:
        x_init = keyed(shape, seed=seed, step=0, samples=rows, use="pretrain")
        encoded = [Condition(family.encode_prompt(text, None, tokens)) for text in texts]
        none = Window(0, 0)
        x0 = rollout(
            denoiser, process, grid, ode, x_init, Condition.cat(encoded), window=none, noise=lambda step: x_init
        ).x0
        return family.decode(x0)

    reward, correct = make(task.reward), 0.0
    for rows in torch.arange(count).split(64):
        chunk = [prompts[i] for i in rows.tolist()]
        texts = [p.text for p in chunk]
        correct += score(reward, sample(texts, rows), texts, [p.metadata for p in chunk]).values.sum().item()
    return correct / count


def denoising_loss(
    process: Process, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, snr_weight: tuple[float, float] | None
) -> Tensor:
    """Return mean ‖output − target‖², or mean clip(SNR, low, high) · ‖x̂0 − x0‖² with SNR = α²/σ².

    For ε-prediction the latter is clip(SNR, low, high)/SNR · ‖ε̂ − ε‖². Above, this is Min-SNR weighting (arXiv:2303.09556,
    §3.4); below, a floor as in truncated SNR weighting (arXiv:2202.00512, §4). Without the floor the noisiest times, which
    decide the layout of a drawing, would have almost no weight.
    """
    if snr_weight is None:
        return F.mse_loss(output, process.target(x0, noise, t).to(output.dtype))
    x0_hat = process.split(output, corrupt(process, x0, noise, t), t)[0]
    snr = (process.alpha(t) / process.sigma(t)).square()
    return (snr.clamp(*snr_weight) * (x0_hat - x0).square().flatten(1).mean(1)).mean().float()


def train_denoiser(
    family: Family,
    architecture: Architecture,
    latents: Tensor,
    texts: Sequence[str],
    config: DenoiserConfig,
    seed: int,
    work: Path,
) -> None:
    """Train the denoiser and its text encoders together on latents [N, ...] and their prompts."""
    pipeline, process = family.pipeline, family.process

    def token_ids(strings: Sequence[str]) -> Tensor:
        ids: Tensor = pipeline.tokenizer(list(strings), padding="max_length", return_tensors="pt").input_ids
        return ids

    ids, empty = token_ids(texts), token_ids([""])

    def compute_loss(step: int) -> Tensor:
        generator = _generator(seed + 1, step)
        rows = torch.randint(len(latents), (config.batch,), generator=generator)
        dropped = torch.rand(config.batch, generator=generator) < config.drop
        t = TIMES[config.times](config.batch, generator)
        x0 = latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        x_t = corrupt(process, x0, noise, t)
        used = torch.where(dropped[:, None], empty, ids[rows])
        if config.lengths:
            length = config.lengths[int(torch.randint(len(config.lengths), (), generator=generator))]
            used = F.pad(used, (0, length - used.shape[1]), value=pipeline.tokenizer.pad_token_id)
        condition = architecture.encode(pipeline, used)
        output = architecture.call(pipeline, x_t, process.timestep(t).float(), condition).float()
        return denoising_loss(process, output, x0, noise, t, config.snr_weight)

    def evaluate() -> str:
        tokens = config.lengths[0] if config.lengths else None
        count, steps = config.evaluate_images, config.evaluate_steps
        return f"accuracy {measure_accuracy(family, architecture.task, count, steps, seed, tokens):.3f}"

    stage = Stage("denoiser", config, architecture.trained(pipeline), work)
    stage.run(compute_loss, evaluate if config.evaluate_images else None)


def pretrain_images(config: ImagesConfig) -> None:
    """Run every stage, and write the pipeline (float16) and the judge."""
    config.work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(config.seed)
    architecture = ARCHITECTURES[config.architecture]
    task = architecture.task
    prompts = task.sample(config.drawings, rng)
    log.info("drawing %d scenes", config.drawings)
    with phase(f"drawing {config.drawings} scenes"):
        images = task.draw([p.metadata for p in prompts], rng)
    pipeline = architecture.build([p.text for p in task.prompts], config.seed)
    restore_padding = remember_padding(pipeline.components.values())
    family = build_family(pipeline).with_inputs(architecture.inputs)
    if config.vae is not None:
        train_vae(architecture, pipeline.vae, images, config.vae, config.seed, config.work)
    if config.decoder is not None:
        train_decoder(architecture, pipeline.vae, images, config.decoder, config.seed, config.work)
    parts = []
    with phase("encoding drawings", total=len(images)):
        for chunk in images.split(256):
            parts.append(family.encode_images(chunk))
            count_done(len(chunk))
    latents = torch.cat(parts)
    texts = [p.text for p in prompts]
    train_denoiser(family, architecture, latents, texts, config.denoiser, config.seed, config.work)
    restore_padding()
    pipeline.to(torch.float16).save_pretrained(config.output, safe_serialization=True)
    log.info("wrote %s", config.output)
    if config.judge is not None:
        train_judge(config.judge, config.seed, config.work).save(config.judge.output)
        log.info("wrote %s", config.judge.output)
