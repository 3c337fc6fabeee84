"""Architecture of tiny-sd: a StableDiffusionPipeline for 32x32 drawings, its UNet of 2.5 million parameters.

Everything is diffusers' and transformers' own class at a small size, so whatever works on tiny-sd goes through the code
that runs Stable Diffusion 1.x. The autoencoder is tiny-sd3's, rewritten without a shift; the safety checker is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from difrl.pretraining.tiny_parts import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    build_clip_config,
    build_tokenizer,
    zero_modules,
)
from difrl.runtime.paths import asset

TEXT_WIDTH = 96


def without_shift(vae: AutoencoderKL) -> AutoencoderKL:
    """Return the same autoencoder with the shift of its latents inside: Stable Diffusion 1.x has only a scaling factor.

    The 1x1 convolution after the encoder subtracts the shift from the mean, the one before the decoder adds it.
    """
    config = {key: value for key, value in vae.config.items() if key != "_name_or_path"}  # a path of this machine
    shift = vae.config.shift_factor
    result = AutoencoderKL.from_config(
        {**config, "shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True}
    )
    result.load_state_dict(vae.state_dict(), strict=False)
    channels = config["latent_channels"]
    with torch.no_grad():
        for conv in (result.quant_conv, result.post_quant_conv):
            conv.weight.copy_(torch.eye(len(conv.weight))[:, :, None, None])
        result.quant_conv.bias.zero_()[:channels] = -shift
        result.post_quant_conv.bias.fill_(shift)
    return result


def build_vae() -> AutoencoderKL:
    """Return the shipped autoencoder of tiny-sd3 without shift: [B, 3, 32, 32] to [B, 8, 8, 8]."""
    return without_shift(AutoencoderKL.from_pretrained(asset("tiny-sd3"), subfolder="vae", dtype=torch.float32))


def build_unet() -> UNet2DConditionModel:
    """Return a UNet of two levels, 8x8 and 4x4, the lower with self- and cross-attention. It starts as the zero function."""
    model = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion 1.x
        norm_num_groups=8,
        time_embedding_dim=128,
        resnet_time_scale_shift="scale_shift",
    )
    # Each residual branch and the output start at zero (arXiv:2105.05233).
    zero_modules(model, (".conv2", ".proj_out", "conv_out"))
    return model


def build_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion 1.x's schedule. Trailing spacing starts at the end of the table (arXiv:2305.08891)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def build_pipeline(texts: Sequence[str], seed: int) -> StableDiffusionPipeline:
    """Return the untrained pipeline, in float32 on the CPU."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(texts)
    return StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=CLIPTextModel(build_clip_config(tokenizer, TEXT_WIDTH)),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def encode_tokens(pipeline: StableDiffusionPipeline, ids: Tensor) -> dict[str, Tensor]:
    """Return the UNet's condition for token ids [B, 12], with gradients: embeds [B, 12, 96]."""
    return {"embeds": pipeline.text_encoder(ids).last_hidden_state}


def call_denoiser(
    pipeline: StableDiffusionPipeline, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]
) -> Tensor:
    """Return the denoiser's output [B, ...] for states [B, ...] at timesteps [B], with gradients of the condition too."""
    output: Tensor = pipeline.unet(x_t, timestep, condition["embeds"], return_dict=False)[0]
    return output


def trained_modules(pipeline: StableDiffusionPipeline) -> list[nn.Module]:
    """Return the UNet and the text encoder, which are trained together."""
    return [pipeline.unet, pipeline.text_encoder]
