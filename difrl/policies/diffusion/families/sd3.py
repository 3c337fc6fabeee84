"""Stable Diffusion 3 and 3.5: an MMDiT by flow matching, two CLIP encoders and an optional T5 (arXiv:2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from difrl.policies.diffusion.families.base import Family
from samplers import FlowMatching, Process

WITHOUT_T5 = "_pretrained_without_t5"
"""Key of model_index.json, true for a model that has never seen tokens of T5, not even zeros in their place."""


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5, with or without T5."""

    pipeline_class = StableDiffusion3Pipeline
    denoiser_name = "transformer"
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

    index_keys = (WITHOUT_T5,)

    @classmethod
    def part_overrides(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """Pass an explicit None for T5 where a folder has none, or diffusers refuses to load it."""
        return {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name, (None, None))[0] is None}

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

    def tokenizers(self, max_sequence_length: int | None) -> dict[str, tuple[Any, int]]:
        found = super().tokenizers(max_sequence_length)
        t5 = found.pop("tokenizer_3", None)
        return found if t5 is None else {**found, "tokenizer_3": (t5[0], self._t5_tokens(max_sequence_length))}

    def _t5_tokens(self, max_sequence_length: int | None) -> int:
        # Stable Diffusion 3 was pretrained with zeros in the place of T5's tokens for a part of the captions, so the
        # pipeline appends as many zeros if T5 is not loaded. Models without T5 from the start have seen neither.
        default = 0 if self.pipeline.config.get(WITHOUT_T5) else 256
        return default if max_sequence_length is None else max_sequence_length

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
        shape = super().latent_shape(height, width)
        largest = self.denoiser.config.pos_embed_max_size * self.patch_size
        for name, side in zip(("height", "width"), shape[-2:], strict=True):
            if side > largest:
                unit = self.pipeline.vae_scale_factor
                raise ValueError(
                    f"rollout.{name}: found {side * unit} pixels, expected at most {largest * unit}: the model has no positions "
                    "for more (pos_embed_max_size)"
                )
        return shape

    @property
    def patch_size(self) -> int:
        size: int = self.denoiser.config.patch_size
        return size
