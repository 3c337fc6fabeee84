"""The Gaussian task (difrl/tasks/exact/gaussian.py): a model with known answers, trained like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from difrl.policies.diffusion.families.base import Family
from difrl.tasks.exact.gaussian import GaussianPipeline
from samplers import Process


class GaussianFamily(Family):
    """Prompts are one-hot vectors, latents are images."""

    pipeline_class = GaussianPipeline
    denoiser_name = "denoiser"

    @property
    def process(self) -> Process:
        process: Process = self.denoiser.process
        return process

    def encode_prompts(self, texts: Sequence[str], max_sequence_length: int | None) -> dict[str, Tensor]:
        known = list(self.denoiser.config.means)
        unknown = sorted({*texts} - {*known})
        if unknown:
            raise ValueError(f"the Gaussian task has no prompt {unknown[0]!r}; expected one of {known}")
        rows = torch.tensor([known.index(text) for text in texts])
        return {"prompt": nn.functional.one_hot(rows, len(known)).float()}

    def call(self, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self.denoiser(x_t, timestep, condition["prompt"])
        return output

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        return (len(self.denoiser.config.covariance), 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the latents [B, 3, 1, 1] themselves, neither scaled nor clamped: the known answers hold for them."""
        return latents.float()

    def encode_images(self, images: Tensor) -> Tensor:
        return images.float()
