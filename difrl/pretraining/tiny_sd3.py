"""Architecture of tiny-sd3: a StableDiffusion3Pipeline for 32x32 drawings, its denoiser of 2.3 million parameters.

Everything is diffusers' and transformers' own class at a small size, so whatever works on tiny-sd3 goes through the
code that runs Stable Diffusion 3. Left out: the T5 encoder (as SD3 allows), QK norm and dual attention (SD3.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from difrl.policies.diffusion.families.modular import WITHOUT_T5
from difrl.pretraining.tiny_parts import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    build_clip_config,
    build_tokenizer,
    zero_modules,
)

TEXT_WIDTH = 64


def build_vae() -> AutoencoderKL:
    """Return an f4 autoencoder, [B, 3, 32, 32] to [B, 8, 8, 8], with 0.24 million parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_transformer() -> SD3Transformer2DModel:
    """Return a four-layer MMDiT on 64 latent tokens, with 2.3 million parameters. It starts as the zero function."""
    model = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
    )
    # adaLN-zero (arXiv:2212.09748): every block starts as the identity and the output as zero.
    zero_modules(model, ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out"))
    return model


def build_pipeline(texts: Sequence[str], seed: int) -> StableDiffusion3Pipeline:
    """Return the untrained pipeline, in float32 on the CPU."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(texts)
    clip = build_clip_config(tokenizer, TEXT_WIDTH, projection_dim=TEXT_WIDTH)
    pipeline = StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=build_vae(),
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.register_to_config(**{WITHOUT_T5: True})
    return pipeline


def encode_tokens(pipeline: StableDiffusion3Pipeline, ids: Tensor) -> dict[str, Tensor]:
    """Return the transformer's condition for token ids [B, 12], with gradients.

    They are prompt_embeds [B, 12, 128] and pooled_prompt_embeds [B, 128], as from the pipeline's encode_prompt without T5, which
    takes strings only.
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
    embeds = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": torch.cat([o.text_embeds for o in outputs], dim=-1)}


def call_denoiser(
    pipeline: StableDiffusion3Pipeline, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]
) -> Tensor:
    """Return the denoiser's output [B, ...] for states [B, ...] at timesteps [B], with gradients of the condition too."""
    output: Tensor = pipeline.transformer(
        x_t, condition["prompt_embeds"], condition["pooled_prompt_embeds"], timestep, return_dict=False
    )[0]
    return output


def trained_modules(pipeline: StableDiffusion3Pipeline) -> list[nn.Module]:
    """Return the transformer and both text encoders, which are trained together."""
    return [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]
