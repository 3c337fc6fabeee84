"""What a policy needs to know of a diffusers pipeline; everything here is the pipeline's own code under one name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samplers import Process


class Family(ABC):
    """One pipeline and the names of its parts. Holds no weights of its own."""

    lora_targets: tuple[str, ...]
    """Suffixes of the linear modules that LoRA adapts by default."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @classmethod
    @abstractmethod
    def load(cls, path: str, dtype: torch.dtype, revision: str | None) -> Any:
        """The pipeline at a hub id or folder, its weights in `dtype`."""

    @classmethod
    @abstractmethod
    def skeleton(cls, path: str, revision: str | None) -> Any:
        """The same pipeline without weights (families/skeleton.py) or tokenizers, to count what it would cost."""

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The module that is trained."""

    @property
    @abstractmethod
    def process(self) -> Process:
        """The corruption process the model was trained with."""

    @abstractmethod
    def encode_prompts(self, texts: Sequence[str], max_sequence_length: int | None) -> dict[str, Tensor]:
        """What the denoiser is conditioned on: name -> [len(texts), ...]."""

    @abstractmethod
    def condition_shapes(self, max_sequence_length: int | None) -> dict[str, tuple[int, ...]]:
        """Shapes of what `encode_prompts` gives for one text, for a skeleton, which cannot encode."""

    @abstractmethod
    def call(self, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The denoiser's raw output for states [B, ...] at its own timesteps [B]."""

    @abstractmethod
    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """Shape of one latent for an image of that many pixels; the model's own size by default."""

    @abstractmethod
    def sequence_length(self, latent_shape: Sequence[int]) -> int:
        """Image tokens of one latent, on which dynamically shifted schedules depend."""

    @abstractmethod
    def save_lora(self, folder: Path) -> None:
        """Writes the adapter so that the pipeline's own load_lora_weights reads it, scale included."""

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler, from which the times of a run are taken."""
        return self.pipeline.scheduler

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32, of latents [B, ...]."""
        vae = self.pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift
        images: Tensor = vae.decode(latents, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, ...], float32, of images [B, 3, H, W] in [0, 1]: the mean of the autoencoder's posterior."""
        vae = self.pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents: Tensor = vae.encode(images.to(vae.device, vae.dtype) * 2 - 1).latent_dist.mean
        return (latents.float() - shift) * vae.config.scaling_factor
