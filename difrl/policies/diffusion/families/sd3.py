"""Stable Diffusion 3 and 3.5: an MMDiT by flow matching, two CLIP encoders and an optional T5 (arXiv:2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from difrl.policies.diffusion.families.base import Family
from difrl.policies.diffusion.families.meta_parts import skeleton_parts
from samplers import FlowMatching, Process

# The parts a pipeline folder may lack. diffusers wants an explicit None for them, or it refuses to load.
_OPTIONAL = ("text_encoder_3", "tokenizer_3")


class StableDiffusion3(Family):
    """The SD3 names of what a policy needs."""

    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    @classmethod
    def load(cls, path: str, dtype: torch.dtype, revision: str | None) -> StableDiffusion3Pipeline:
        index = StableDiffusion3Pipeline.load_config(path, revision=revision)
        absent: dict[str, Any] = {name: None for name in _OPTIONAL if index.get(name, (None, None))[0] is None}
        return StableDiffusion3Pipeline.from_pretrained(
            path, dtype=dtype, revision=revision, use_safetensors=True, **absent
        )

    @classmethod
    def skeleton(cls, path: str, revision: str | None) -> StableDiffusion3Pipeline:
        absent: dict[str, Any] = dict.fromkeys(_OPTIONAL)
        return StableDiffusion3Pipeline(**{**absent, **skeleton_parts(path, revision)})

    @property
    def denoiser(self) -> nn.Module:
        module: nn.Module = self.pipeline.transformer
        return module

    @property
    def process(self) -> Process:
        return FlowMatching(self.scheduler.config.num_train_timesteps)

    def encode_prompts(self, texts: Sequence[str], max_sequence_length: int | None) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts),
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self._t5_tokens(max_sequence_length),
        )
        return {"embeds": embeds, "pooled": pooled}

    def _t5_tokens(self, max_sequence_length: int | None) -> int:
        # Without T5 the pipeline would append that many zeros: slower, and unlike what such a model was trained on.
        default = 256 if self.pipeline.text_encoder_3 is not None else 0
        return default if max_sequence_length is None else max_sequence_length

    def condition_shapes(self, max_sequence_length: int | None) -> dict[str, tuple[int, ...]]:
        config, clip = self.pipeline.transformer.config, self.pipeline.text_encoder.config
        tokens = clip.max_position_embeddings + self._t5_tokens(max_sequence_length)
        return {"embeds": (tokens, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def call(self, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self.denoiser(
            hidden_states=x_t,
            timestep=timestep,
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
        return output

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        config, factor = self.pipeline.transformer.config, self.pipeline.vae_scale_factor
        size = config.sample_size
        unit = factor * config.patch_size
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and pixels % unit:
                raise ValueError(f"rollout.{name}: found {pixels} pixels, expected a multiple of {unit} for this model")
        return (config.in_channels, height // factor if height else size, width // factor if width else size)

    def sequence_length(self, latent_shape: Sequence[int]) -> int:
        patch = self.pipeline.transformer.config.patch_size
        return (latent_shape[-2] // patch) * (latent_shape[-1] // patch)

    def save_lora(self, folder: Path) -> None:
        transformer = self.pipeline.transformer
        layers = {k: v.detach().float().cpu().contiguous() for k, v in get_peft_model_state_dict(transformer).items()}
        # Without the metadata alpha is lost on reload and the adapter comes back at another strength.
        metadata = _collate_lora_metadata({"transformer": transformer})
        StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers, **metadata)
