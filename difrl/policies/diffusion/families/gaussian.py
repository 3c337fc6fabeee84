"""The Gaussian task (difrl/tasks/exact/gaussian.py): a model with known answers, trained like any other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from PIL.Image import Image
from torch import Tensor, nn

from difrl.policies.diffusion.families.base import Family
from difrl.tasks.exact.gaussian import GaussianPipeline
from samplers import Process


class GaussianFamily(Family):
    """Prompts are one-hot vectors, latents are images."""

    pipeline_class = GaussianPipeline
    denoiser_names = ("denoiser",)

    @property
    def process(self) -> Process:
        process: Process = self.denoiser.process
        return process

    def encode_prompt(self, text: str, image: Image | None, max_sequence_length: int | None) -> dict[str, Tensor]:
        known = list(self.denoiser.config.means)
        if text not in known:
            raise ValueError(f"the Gaussian task has no prompt {text!r}; expected one of {known}")
        return {"prompt": nn.functional.one_hot(torch.tensor([known.index(text)]), len(known)).float()}

    def call(self, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self.denoiser(x_t, timestep, condition["prompt"])
        return output

    def latent_shape(self) -> tuple[int, ...]:
        return (len(self.denoiser.config.covariance), 1, 1)

    @property
    def size(self) -> tuple[int, int]:
        return 1, 1

    def decode(self, latents: Tensor) -> Tensor:
        """Return the latents [B, 3, 1, 1] themselves, neither scaled nor clamped: the known answers hold for them."""
        return latents.float()

    def encode_images(self, images: Tensor) -> Tensor:
        return images.float()
