"""The Gaussian world (difrl/tasks/exact/gaussian.py): a model whose every answer is known, trained like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from difrl.policies.diffusion.families.base import Family
from difrl.policies.diffusion.families.meta_parts import skeleton_parts
from difrl.tasks.exact.gaussian import GaussianDenoiser, GaussianPipeline
from samplers import Process


class Gaussian(Family):
    """Prompts are one-hot vectors, latents are images."""

    lora_targets = ()

    @classmethod
    def load(cls, path: str, dtype: torch.dtype, revision: str | None) -> GaussianPipeline:
        return GaussianPipeline.from_pretrained(path, dtype=dtype, revision=revision, use_safetensors=True)

    @classmethod
    def skeleton(cls, path: str, revision: str | None) -> GaussianPipeline:
        scheduler: SchedulerMixin = skeleton_parts(path, revision)["scheduler"]
        config = GaussianDenoiser.load_config(path, subfolder="denoiser", revision=revision)
        return GaussianPipeline(GaussianDenoiser.from_config(config).to("meta"), scheduler)

    @property
    def denoiser(self) -> GaussianDenoiser:
        module: GaussianDenoiser = self.pipeline.denoiser
        return module

    @property
    def process(self) -> Process:
        return self.denoiser.process

    def encode_prompts(self, texts: Sequence[str], max_sequence_length: int | None) -> dict[str, Tensor]:
        known = list(self.denoiser.config.means)
        unknown = sorted({*texts} - {*known})
        if unknown:
            raise ValueError(f"the Gaussian world has no prompt {unknown[0]!r}; expected one of {known}")
        rows = torch.tensor([known.index(text) for text in texts])
        return {"prompt": nn.functional.one_hot(rows, len(known)).float()}

    def condition_shapes(self, max_sequence_length: int | None) -> dict[str, tuple[int, ...]]:
        return {"prompt": (len(self.denoiser.config.means),)}

    def call(self, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self.denoiser(x_t, timestep, condition["prompt"])
        return output

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        return (len(self.denoiser.config.covariance), 1, 1)

    def sequence_length(self, latent_shape: Sequence[int]) -> int:
        return 1

    def save_lora(self, folder: Path) -> None:
        raise ValueError("the Gaussian world has no linear modules for LoRA to adapt; set model.train: full")

    def decode(self, latents: Tensor) -> Tensor:
        """The latents [B, 3, 1, 1] themselves, neither scaled nor clamped: a reward sees what the answers are about."""
        return latents.float()

    def encode_images(self, images: Tensor) -> Tensor:
        return images.float()
