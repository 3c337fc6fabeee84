"""Random pipelines of published families, saved in the classic format of diffusers, for tests of every family.

Component classes, configuration keys and scheduler settings are those of the published models. Widths and depths are tiny.
The configurations follow `get_dummy_components` of diffusers' own tests (tests/pipelines) where those have one.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from difrl.pretraining.tiny_parts import build_clip_config, build_tokenizer
from difrl.tasks import shapes
from tests.tiny_models import WIDTH, build_t5, build_t5_tokenizer, build_vae

PROMPT, NEGATIVE = "a red circle", "two blue squares"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The turns of Qwen's chat template. Its parts for tools and reasoning are left out."""

QWEN_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def tiny_sdxl(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random SDXL pipeline for 8x8 images."""
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
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        norm_num_groups=4,
    )
    euler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    pipeline = StableDiffusionXLPipeline(
        unet=randomize(unet),
        scheduler=scheduler or euler,
        vae=build_vae(),
        text_encoder=CLIPTextModel(build_clip_config(tokenizer, WIDTH)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(build_clip_config(tokenizer, WIDTH, projection_dim=WIDTH)),
        tokenizer_2=tokenizer,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_flux(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random FLUX.1-dev pipeline for 16x16 images: distilled guidance, shift by the number of tokens."""
    torch.manual_seed(seed)
    dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    FluxPipeline(**_flux_parts(scheduler or dynamic, guidance=True)).save_pretrained(folder)
    return folder


def tiny_flux_schnell(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random FLUX.1-schnell pipeline for 16x16 images: no guidance, no shift."""
    torch.manual_seed(seed)
    FluxPipeline(**_flux_parts(scheduler or FlowMatchEulerDiscreteScheduler(), guidance=False)).save_pretrained(folder)
    return folder


def tiny_qwen_image(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random Qwen-Image pipeline for 32x32 images."""
    torch.manual_seed(seed)
    tokenizer = build_qwen_tokenizer([_template(QwenImagePipeline)])
    pipeline = QwenImagePipeline(
        transformer=_qwen_transformer(),
        scheduler=scheduler or _qwen_scheduler(),
        vae=_qwen_vae(),
        text_encoder=_qwen_vl(tokenizer),
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(folder)
    return folder


def randomize(model: nn.Module, std: float = 0.15) -> nn.Module:
    """Draw every weight of two or more axes from a normal distribution, and return the model.

    Diffusers starts last layers and gates at zero in places. A picture would not depend on the layers before those.
    """
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=std)
    return model


def build_qwen_tokenizer(texts: Sequence[str]) -> Qwen2Tokenizer:
    """Return a Qwen2 tokenizer whose byte-pair merges join every word of the texts and of the shapes into one token.

    Published vocabularies hold all words of the pipelines' prompt templates. The pipelines cut the templates off by their
    published number of tokens.
    """
    vocab, merges = _train_bytes([*texts, CHAT_TEMPLATE, *(p.text for p in shapes.prompts())])
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=list(QWEN_SPECIAL))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _train_bytes(texts: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a byte-level BPE over the texts, with all 256 bytes in it."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    trained = json.loads(bpe.to_str())["model"]
    return trained["vocab"], [tuple(pair) for pair in trained["merges"]]


def _template(pipeline: type[DiffusionPipeline]) -> str:
    """Return the text that the pipeline wraps around a prompt."""
    parts = inspect.signature(pipeline).parameters
    return str(pipeline(**dict.fromkeys(parts)).prompt_template_encode)


def _flux_parts(scheduler: SchedulerMixin, guidance: bool) -> dict[str, Any]:
    tokenizer = build_tokenizer([p.text for p in shapes.prompts()])
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    return {
        "transformer": randomize(transformer),
        "scheduler": scheduler,
        "vae": build_vae(shift_factor=0.1),
        "text_encoder": CLIPTextModel(build_clip_config(tokenizer, WIDTH)),
        "tokenizer": tokenizer,
        "text_encoder_2": build_t5(),
        "tokenizer_2": build_t5_tokenizer(),
    }


def _qwen_transformer() -> QwenImageTransformer2DModel:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    return randomize(transformer)


def _qwen_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )


def _qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.3, 0.2, 0.1, -0.1],
        latents_std=[1.2, 0.8, 1.1, 0.9],
    )


def _qwen_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.3,
        },
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in VISION_TOKENS.items()},
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


VISION_TOKENS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}


@dataclass(frozen=True)
class Family:
    """A published family: how its tiny pipeline is built, and a call of it."""

    build: Callable[..., Path]
    """Saves the pipeline: (folder, scheduler=None, seed=0) -> folder. A scheduler replaces the published one."""
    pipeline: type[DiffusionPipeline]
    """The classic class of model_index.json."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of a call beside the prompt, generator and number of steps."""
    prompt: str = PROMPT
    slow: bool = False
    """Its tests take more than about 1.5 seconds."""


FAMILIES = {
    "sdxl": Family(
        tiny_sdxl,
        StableDiffusionXLPipeline,
        {"negative_prompt": NEGATIVE, "guidance_scale": 3.0, "height": 8, "width": 8},
    ),
    "flux-dev": Family(
        tiny_flux, FluxPipeline, {"guidance_scale": 3.5, "height": 16, "width": 16, "max_sequence_length": 12}
    ),
    "flux-schnell": Family(
        tiny_flux_schnell, FluxPipeline, {"guidance_scale": 0.0, "height": 16, "width": 16, "max_sequence_length": 12}
    ),
    "qwen-image": Family(
        tiny_qwen_image,
        QwenImagePipeline,
        {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0, "height": 32, "width": 32, "max_sequence_length": 32},
    ),
}


def draw(pipeline: DiffusionPipeline, family: Family, *, seed: int = 0, steps: int = 2, **inputs: Any) -> Tensor:
    """Return the images [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1] of a call. `inputs` replace the family's."""
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": family.prompt, **family.inputs, **inputs, "num_inference_steps": steps, "output_type": "pt"}
    generator = torch.Generator().manual_seed(seed)
    drawn: Tensor = pipeline(**call, generator=generator, return_dict=False)[0]
    return drawn
