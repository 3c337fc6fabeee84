"""Stable Diffusion 1.x and 2.x: a variance-preserving UNet and one CLIP encoder (arXiv:2112.10752).

The safety checker is never loaded: rewards are to see what the model draws, not what a filter leaves of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from difrl.policies.diffusion.families.base import Family
from difrl.policies.diffusion.families.meta_parts import skeleton_parts
from samplers import Process, VariancePreserving

_WITHOUT_CHECKER: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "image_encoder": None,
    "requires_safety_checker": False,
}


class StableDiffusion(Family):
    """The names that Stable Diffusion 1.x and 2.x have for what a policy needs."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @classmethod
    def load(cls, path: str, dtype: torch.dtype, revision: str | None) -> StableDiffusionPipeline:
        return StableDiffusionPipeline.from_pretrained(
            path, dtype=dtype, revision=revision, use_safetensors=True, **_WITHOUT_CHECKER
        )

    @classmethod
    def skeleton(cls, path: str, revision: str | None) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(**{**skeleton_parts(path, revision), **_WITHOUT_CHECKER})

    @property
    def denoiser(self) -> nn.Module:
        module: nn.Module = self.pipeline.unet
        return module

    @property
    def scheduler(self) -> DDIMScheduler:
        """DDIM on the pipeline's own table and spacing; published pipelines come with PNDM, whose times repeat."""
        return DDIMScheduler.from_config(self.pipeline.scheduler.config)

    @property
    def process(self) -> Process:
        scheduler = self.scheduler
        return VariancePreserving(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def encode_prompts(self, texts: Sequence[str], max_sequence_length: int | None) -> dict[str, Tensor]:
        device = self.pipeline.text_encoder.device
        embeds, _ = self.pipeline.encode_prompt(list(texts), device, 1, do_classifier_free_guidance=False)
        return {"embeds": embeds}

    def condition_shapes(self, max_sequence_length: int | None) -> dict[str, tuple[int, ...]]:
        clip = self.pipeline.text_encoder.config
        return {"embeds": (clip.max_position_embeddings, self.pipeline.unet.config.cross_attention_dim)}

    def call(self, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self.denoiser(x_t, timestep, encoder_hidden_states=condition["embeds"], return_dict=False)[0]
        return output

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        config, factor = self.pipeline.unet.config, self.pipeline.vae_scale_factor
        size = config.sample_size
        # What the UNet halves on its way down must come out even: the pipeline itself fails late on other sizes.
        unit = factor * 2 ** (len(config.block_out_channels) - 1)
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and pixels % unit:
                raise ValueError(f"rollout.{name}: found {pixels} pixels, expected a multiple of {unit} for this model")
        return (config.in_channels, height // factor if height else size, width // factor if width else size)

    def sequence_length(self, latent_shape: Sequence[int]) -> int:
        return latent_shape[-2] * latent_shape[-1]

    def save_lora(self, folder: Path) -> None:
        unet = self.pipeline.unet
        layers = {k: v.detach().float().cpu().contiguous() for k, v in get_peft_model_state_dict(unet).items()}
        # Without the metadata alpha is lost on reload and the adapter comes back at another strength.
        metadata = _collate_lora_metadata({"unet": unet})
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, **metadata)
