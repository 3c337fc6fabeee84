"""Architecture of tiny-wan: a WanPipeline for videos of 5 frames of 32x32, its denoiser of 0.7 million parameters.

Everything is diffusers' and transformers' own class at a small size, so whatever works on tiny-wan goes through the code
that runs Wan 2.1 and 2.2. The autoencoder works on patches of 2x2 pixels, as that of Wan 2.2 does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from difrl.pretraining.tiny_parts import LATENT_CHANNELS, MAX_TOKENS, zero_modules

TEXT_WIDTH = 64


def build_vae() -> AutoencoderKLWan:
    """Return an autoencoder, [B, 3, 5, 32, 32] to [B, 8, 3, 8, 8], with 0.47 million parameters."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )


def build_tokenizer(texts: Sequence[str]) -> T5TokenizerFast:
    """Return a T5 tokenizer in which every word of the texts is a token."""
    words = sorted({word for text in texts for word in text.split()})
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in words)]
    vocabulary = [(piece, -float(i > 2)) for i, piece in enumerate(pieces)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)


def build_transformer() -> WanTransformer3DModel:
    """Return a four-layer DiT on 48 latent tokens. It starts as the zero function."""
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        rope_max_seq_len=64,
    )
    zero_modules(model, ("proj_out",))
    return model


def build_pipeline(texts: Sequence[str], seed: int) -> WanPipeline:
    """Return the untrained pipeline, in float32 on the CPU."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(texts)
    text = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=4 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
    )
    return WanPipeline(
        transformer=build_transformer(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0),
        vae=build_vae(),
        text_encoder=UMT5EncoderModel(text),
        tokenizer=tokenizer,
    )


def to_vae(videos: Tensor) -> Tensor:
    """Return videos [B, F, 3, H, W] in [0, 1] as the autoencoder takes them: [B, 3, F, H, W] in [-1, 1]."""
    return videos.transpose(1, 2) * 2 - 1


@torch.no_grad()
def normalise_latents(vae: AutoencoderKLWan, latents: Tensor) -> None:
    """Store mean and spread of each channel of latents [N, 8, 3, 8, 8]."""
    channels = latents.transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=channels.mean(1).tolist(), latents_std=channels.std(1).tolist())


def encode_tokens(pipeline: WanPipeline, ids: Tensor) -> dict[str, Tensor]:
    """Return the transformer's condition for token ids [B, L], with gradients: prompt_embeds [B, L, 64].

    It equals the pipeline's encode_prompt, which takes strings only: embeddings of padding are zeros.
    """
    mask = (ids != pipeline.tokenizer.pad_token_id).long()
    embeds: Tensor = pipeline.text_encoder(ids, mask).last_hidden_state * mask[..., None]
    return {"prompt_embeds": embeds}


def call_denoiser(pipeline: WanPipeline, x_t: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    """Return the denoiser's output [B, ...] for states [B, ...] at timesteps [B], with gradients of the condition too."""
    output: Tensor = pipeline.transformer(x_t, timestep, condition["prompt_embeds"], return_dict=False)[0]
    return output


def trained_modules(pipeline: WanPipeline) -> list[nn.Module]:
    """Return the transformer and the text encoder, which are trained together."""
    return [pipeline.transformer, pipeline.text_encoder]
