"""Stable Diffusion 1.x and 2.x: a variance-preserving UNet and one CLIP encoder (arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from difrl.policies.diffusion.families.base import Family
from samplers import Process, VariancePreserving


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x. Prompts always have CLIP's 77 tokens."""

    pipeline_class = StableDiffusionPipeline
    denoiser_names = ("unet",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @classmethod
    def part_overrides(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """Leave the safety checker out: rewards score the images of the model, not those that a filter lets pass."""
        return {
            "safety_checker": None,
            "feature_extractor": None,
            "image_encoder": None,
            "requires_safety_checker": False,
        }

    @property
    def scheduler(self) -> DDIMScheduler:
        """DDIM on the pipeline's own table and spacing. Published pipelines come with PNDM, whose times repeat."""
        return DDIMScheduler.from_config(self.pipeline.scheduler.config)

    @property
    def process(self) -> Process:
        scheduler = self.scheduler
        return VariancePreserving(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def encode_prompt(self, text: str, image: Image | None, max_sequence_length: int | None) -> dict[str, Tensor]:
        device = self.pipeline.text_encoder.device
        embeds, _ = self.pipeline.encode_prompt(text, device, 1, do_classifier_free_guidance=False)
        return {"embeds": embeds}

    def call(self, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self.denoiser(x_t, timestep, encoder_hidden_states=condition["embeds"], return_dict=False)[0]
        return output

    @property
    def size_multiple(self) -> int:
        """The UNet halves a latent once between two of its blocks, and every half must be whole."""
        return int(2 ** (len(self.denoiser.config.block_out_channels) - 1))
