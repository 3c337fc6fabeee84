"""Random models of a few thousand parameters in the formats of Stable Diffusion 3 and 1.x and of transformers, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from difrl.pretraining.tiny_parts import build_tokenizer
from difrl.tasks import shapes

WIDTH = 16


def tiny_sd3(folder: Path, *, like_35: bool = False, shift: float = 1.0, seed: int = 0) -> Path:
    """Save a random SD3 pipeline for 8x8 images; `like_35` adds the parts of SD3.5: T5, QK norm, dual attention."""
    torch.manual_seed(seed)
    texts = [p.text for p in shapes.prompts()]
    tokenizer = build_tokenizer(texts)
    clip = _clip(tokenizer)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=4,
        qk_norm="rms_norm" if like_35 else None,
        dual_attention_layers=(0,) if like_35 else (),
    )
    # Diffusers starts the last layers at zero in places; random ones make every input matter.
    for p in transformer.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=build_vae(shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=tokenizer,
        text_encoder_3=build_t5() if like_35 else None,
        tokenizer_3=build_t5_tokenizer() if like_35 else None,
    )
    if not like_35:
        pipeline.register_to_config(_pretrained_without_t5=True)
    pipeline.save_pretrained(folder)
    return folder


def tiny_sd(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random SD 1.x pipeline for 8x8 images, with a DDIM scheduler of its table unless another is given."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer([p.text for p in shapes.prompts()])
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        unet=unet,
        scheduler=scheduler or DDIMScheduler(**SD_TABLE),
        vae=build_vae(),
        text_encoder=CLIPTextModel(_clip(tokenizer)),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_auraflow(folder: Path, seed: int = 0) -> Path:
    """Save a random AuraFlow pipeline for 8x8 images."""
    torch.manual_seed(seed)
    transformer = AuraFlowTransformer2DModel(
        sample_size=4,
        patch_size=2,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=4,
    )
    for p in transformer.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    pipeline = AuraFlowPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=build_vae(),
        text_encoder=build_t5(),
        tokenizer=build_t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


SD_TABLE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""The scheduler_config.json of Stable Diffusion 1.x."""


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_vae(shift_factor: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        mid_block_add_attention=False,
        shift_factor=shift_factor,
        scaling_factor=1.3,
    )


def build_t5() -> T5EncoderModel:
    config = T5Config(vocab_size=64, d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def build_t5_tokenizer() -> T5TokenizerFast:
    words = sorted({w for p in shapes.prompts() for w in p.text.split()})
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{w}" for w in words)]
    return T5TokenizerFast(vocab=[(p, -float(i > 2)) for i, p in enumerate(pieces)], extra_ids=0)


CHARACTERS = ("<pad>", "<eos>", *"0123456789+= ")


def characters_tokenizer(characters: Sequence[str] = CHARACTERS) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character. The first two are padding and the end."""
    words = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def tiny_lm(folder: Path, *, layers: int = 2, tied: bool = False, chat: bool = False, seed: int = 0) -> Path:
    """Save a random Qwen2 over the characters of sums, with its tokenizer; wide weights, so distributions are not uniform."""
    torch.manual_seed(seed)
    fast = characters_tokenizer()
    if chat:
        fast.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    config = Qwen2Config(
        vocab_size=len(CHARACTERS),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
