"""The architecture of tiny-sd3: a StableDiffusion3Pipeline for 32x32 drawings, its denoiser of 2.3 million parameters.

Everything is diffusers' and transformers' own class at a small size, so whatever works on tiny-sd3 goes through the
code that runs Stable Diffusion 3. Left out: the T5 encoder (as SD3 allows), QK norm and dual attention (SD3.5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

LATENT_CHANNELS = 8
LATENT_SIZE = 8
MAX_TOKENS = 12
TEXT_WIDTH = 64
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges join every word of the texts into a single token."""
    # The trainer numbers last letters in the order of a hash map, another one each time, and pretraining that was
    # killed would continue with permuted words. Naming them beforehand fixes the order.
    endings = sorted({f"{word[-1]}</w>" for text in texts for word in text.split()})
    trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", special_tokens=[BOS, EOS, *endings], show_progress=False)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(sorted(set(texts)), trainer)
    learnt = _vocabulary_and_merges(bpe)
    return CLIPTokenizer(vocab=learnt[0], merges=learnt[1], model_max_length=MAX_TOKENS)


def _vocabulary_and_merges(bpe: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]


def build_vae() -> AutoencoderKL:
    """An f4 autoencoder: [B, 3, 32, 32] to [B, 8, 8, 8], 0.24 M parameters."""
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


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A two-layer CLIP text encoder, of whose hidden states SD3 reads the last but one."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_transformer() -> SD3Transformer2DModel:
    """A four-layer MMDiT on 64 latent tokens, 2.3 M parameters, starting from the zero function."""
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
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (
            name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear"))
        ):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def build_pipeline(texts: Sequence[str], seed: int) -> StableDiffusion3Pipeline:
    """The untrained pipeline, in float32 on the CPU."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(texts)
    return StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=build_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def encode_tokens(pipeline: StableDiffusion3Pipeline, ids: Tensor) -> dict[str, Tensor]:
    """What the transformer is conditioned on, of token ids [B, 12], with gradients: embeds [B, 12, 128], pooled [B, 128].

    The same as the pipeline's encode_prompt without T5, which works from strings only.
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
    embeds = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
    return {"embeds": embeds, "pooled": torch.cat([o.text_embeds for o in outputs], dim=-1)}


def trained_modules(pipeline: StableDiffusion3Pipeline) -> list[nn.Module]:
    """The transformer and both text encoders, which learn together."""
    return [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]
