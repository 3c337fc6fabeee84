"""Random pipelines of published families, saved in the classic format of diffusers, for tests of every family.

Component classes, configuration keys and scheduler settings are those of the published models. Widths and depths are tiny.
The configurations follow `get_dummy_components` of diffusers' own tests where those have one.
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
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    DDIMScheduler,
    DiffusionPipeline,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Flux3ModularPipeline,
    Flux3Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    ModularPipeline,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from difrl.pretraining.tiny_parts import build_clip_config, build_tokenizer
from difrl.tasks import shapes
from tests.tiny_models import SD_TABLE, WIDTH, build_t5, build_t5_tokenizer, build_vae

Pipeline = DiffusionPipeline | ModularPipeline
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

MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% set system = m['role'] == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' if system else '[INST]' }}{% for part in m['content'] %}"
    "{{ '[IMG]' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '[/SYSTEM_PROMPT]' if system else '[/INST]' }}{% endfor %}"
)
"""The turns of Mistral Small 3's chat template."""

MISTRAL_SPECIAL = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
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
    tokenizer = build_qwen_tokenizer([get_template(QwenImagePipeline)])
    pipeline = QwenImagePipeline(
        transformer=_qwen_transformer(),
        scheduler=scheduler or _qwen_scheduler(),
        vae=_qwen_vae(),
        text_encoder=randomize(Qwen2_5_VLForConditionalGeneration(_qwen25_vl(tokenizer))),
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_z_image(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random Z-Image pipeline for 16x16 images. Its time embedding is of fixed width: 300,000 parameters."""
    torch.manual_seed(seed)
    tokenizer = build_qwen_tokenizer([])
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[2, 2, 4],
        axes_lens=[256, 32, 32],
    )
    pipeline = ZImagePipeline(
        transformer=randomize(transformer),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=build_vae(shift_factor=0.1),
        text_encoder=randomize(Qwen3Model(_qwen3(tokenizer, WIDTH, layers=3))),
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_flux2(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random FLUX.2-dev pipeline for 16x16 images: distilled guidance, text from layers 10, 20 and 30."""
    torch.manual_seed(seed)
    tokenizer = build_mistral_tokenizer([SYSTEM_MESSAGE])
    processor = PixtralProcessor(
        PixtralImageProcessor(patch_size=4, size={"longest_edge": 16}),
        tokenizer,
        patch_size=4,
        chat_template=MISTRAL_TEMPLATE,
    )
    pipeline = Flux2Pipeline(
        transformer=_flux2_transformer(guidance=True),
        scheduler=scheduler or _flux2_scheduler(),
        vae=_flux2_vae(),
        text_encoder=randomize(Mistral3ForConditionalGeneration(_mistral3(tokenizer, WIDTH // 2, layers=31))),
        tokenizer=processor,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_flux2_klein(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random FLUX.2 klein pipeline for 16x16 images: distilled to few steps, no guidance."""
    torch.manual_seed(seed)
    Flux2KleinPipeline(**_klein_parts(scheduler), is_distilled=True).save_pretrained(folder)
    return folder


def tiny_flux2_klein_base(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random FLUX.2 klein base pipeline for 16x16 images: not distilled, classifier-free guidance."""
    torch.manual_seed(seed)
    Flux2KleinPipeline(**_klein_parts(scheduler), is_distilled=False).save_pretrained(folder)
    return folder


def tiny_ernie_image(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random ERNIE-Image pipeline for 16x16 images, without its optional rewriter of prompts."""
    torch.manual_seed(seed)
    tokenizer = build_mistral_tokenizer([])
    transformer = ErnieImageTransformer2DModel(
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=WIDTH,
        rope_axes_dim=(2, 2, 4),
    )
    pipeline = ErnieImagePipeline(
        transformer=randomize(transformer),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flux2_vae(),
        text_encoder=randomize(Mistral3Model(_mistral3(tokenizer, WIDTH, layers=3))),
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_krea2(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random Krea 2 pipeline for 32x32 images, with text from three layers of a Qwen3-VL."""
    torch.manual_seed(seed)
    krea = inspect.signature(Krea2Pipeline).parameters
    blank = Krea2Pipeline(**{name: None for name, p in krea.items() if p.default is p.empty})
    tokenizer = build_qwen_tokenizer([blank.prompt_template_encode_prefix, blank.prompt_template_encode_suffix])
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15, max_image_seq_len=6400)
    pipeline = Krea2Pipeline(
        transformer=randomize(transformer),
        scheduler=scheduler or dynamic,
        vae=_qwen_vae(),
        text_encoder=randomize(Qwen3VLModel(_qwen3_vl(tokenizer, WIDTH, layers=4))),
        tokenizer=tokenizer,
        text_encoder_select_layers=(1, 2, 3),
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_sd2(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random Stable Diffusion 2 pipeline for 8x8 images: its network predicts v."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer([p.text for p in shapes.prompts()])
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        unet=randomize(unet),
        scheduler=scheduler or DDIMScheduler(**SD_TABLE, prediction_type="v_prediction"),
        vae=build_vae(),
        text_encoder=CLIPTextModel(build_clip_config(tokenizer, WIDTH)),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_flux_kontext(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random FLUX.1 Kontext pipeline, which edits 16x16 images."""
    torch.manual_seed(seed)
    dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    FluxKontextPipeline(**_flux_parts(scheduler or dynamic, guidance=True)).save_pretrained(folder)
    return folder


def tiny_qwen_image_edit(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random Qwen-Image-Edit pipeline, which edits one image. It resizes every image to a million pixels."""
    return _qwen_edit(QwenImageEditPipeline, folder, scheduler, seed)


def tiny_qwen_image_edit_plus(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random Qwen-Image-Edit-Plus (2509) pipeline, which takes several images of a million pixels each."""
    return _qwen_edit(QwenImageEditPlusPipeline, folder, scheduler, seed)


def tiny_qwen_image_21(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random Qwen-Image 2.1 pipeline for 64x64 images of four channels: its autoencoder shrinks 16 times."""
    torch.manual_seed(seed)
    tokenizer = build_qwen_tokenizer(["Comprehend and analyze the provided prompt."])
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=LATENTS_MEAN,
        latents_std=LATENTS_STD,
    )
    pipeline = QwenImage21Pipeline(
        transformer=randomize(transformer),
        scheduler=scheduler or _qwen_scheduler(),
        vae=vae,
        text_encoder=randomize(Qwen3VLForConditionalGeneration(_qwen3_vl(tokenizer, WIDTH, layers=3))),
        processor=_qwen3_vl_processor(tokenizer),
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_flux3(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random FLUX.3 pipeline for 16x16 images, with text from eight of 33 layers of a Qwen3-VL.

    Diffusers has no classic pipeline of it, so the folder is in the modular format (modular_model_index.json).
    """
    torch.manual_seed(seed)
    tokenizer = build_qwen_tokenizer([])
    transformer = Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8 * (WIDTH // 2),
        timestep_channels=32,
        axes_dims_rope=(2, 2, 2, 2),
    )
    pipeline = Flux3ModularPipeline()
    pipeline.update_components(
        transformer=randomize(transformer, std=0.4),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flux2_vae(),
        text_encoder=randomize(Qwen3VLForConditionalGeneration(_qwen3_vl(tokenizer, WIDTH // 2, layers=33))),
        tokenizer=_qwen3_vl_processor(tokenizer),
    )
    pipeline.save_pretrained(str(folder))
    return folder


def tiny_wan21(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random Wan 2.1 text-to-video pipeline for 5 frames of 16x16."""
    torch.manual_seed(seed)
    WanPipeline(**_wan_parts(scheduler), transformer=_wan_transformer()).save_pretrained(folder)
    return folder


def tiny_wan22(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random Wan 2.2 text-to-video pipeline for 5 frames of 16x16: one transformer for each side of t = 0.875."""
    torch.manual_seed(seed)
    experts = {"transformer": _wan_transformer(), "transformer_2": _wan_transformer()}
    WanPipeline(**_wan_parts(scheduler), **experts, boundary_ratio=0.875).save_pretrained(folder)
    return folder


def tiny_wan_i2v(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random Wan 2.1 image-to-video pipeline for 5 frames of 16x16."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    pipeline = WanImageToVideoPipeline(
        **_wan_parts(scheduler),
        # Noise, a mask of as many channels as the autoencoder merges frames, and the encoded image.
        transformer=_wan_transformer(in_channels=4 + 2 + 4, image_dim=WIDTH),
        image_encoder=randomize(CLIPVisionModel(vision)),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_ltx(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random LTX-Video 0.9 pipeline for 5 frames of 32x32."""
    torch.manual_seed(seed)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
        num_layers=2,
        caption_channels=2 * WIDTH,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=1,
    )
    vae.latents_mean.copy_(torch.tensor(LATENTS_MEAN))
    vae.latents_std.copy_(torch.tensor(LATENTS_STD))
    dynamic = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    pipeline = LTXPipeline(
        transformer=randomize(transformer),
        scheduler=scheduler or dynamic,
        vae=vae,
        text_encoder=build_t5(),
        tokenizer=build_t5_tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_hunyuan_video(folder: Path, scheduler: SchedulerMixin | None = None, seed: int = 0) -> Path:
    """Save a random HunyuanVideo 1.5 text-to-video pipeline for 5 frames of 16x16.

    The projection of its second text encoder is of fixed width: 4.2 million parameters. That encoder reads only words
    in quotation marks.
    """
    torch.manual_seed(seed)
    encode = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds)
    tokenizer = build_qwen_tokenizer([encode.parameters["system_message"].default])
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=4 + 4 + 1,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    glyphs = T5Config(vocab_size=384, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipeline = HunyuanVideo15Pipeline(
        transformer=randomize(transformer),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae,
        text_encoder=randomize(Qwen2_5_VLTextModel(_qwen25_vl(tokenizer, layers=4).text_config)),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(glyphs),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )
    pipeline.save_pretrained(folder)
    return folder


def randomize(model: nn.Module, std: float = 0.25) -> nn.Module:
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
    words = [*texts, CHAT_TEMPLATE, "system\nuser\nassistant\n", *(p.text for p in shapes.prompts())]
    bpe = json.loads(_train_bytes(words).to_str())["model"]
    vocab, merges = bpe["vocab"], [tuple(pair) for pair in bpe["merges"]]
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=list(QWEN_SPECIAL))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_mistral_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with Mistral's special tokens: <s> comes first, padding is on the left."""
    bpe = _train_bytes([*texts, *(p.text for p in shapes.prompts())])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens=list(MISTRAL_SPECIAL),
    )
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = start
    return tokenizer


def _train_bytes(texts: Sequence[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer that has all 256 bytes and every word of the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return bpe


def get_template(pipeline: type[DiffusionPipeline]) -> str:
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


def _qwen_transformer(std: float = 0.25) -> QwenImageTransformer2DModel:
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
    return randomize(transformer, std)


def _qwen_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )


def _qwen_vae(levels: int = 3) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1] * levels,
        num_res_blocks=1,
        temperal_downsample=[False] + [True] * (levels - 2),
        latents_mean=LATENTS_MEAN,
        latents_std=LATENTS_STD,
    )


def _qwen25_vl(tokenizer: Qwen2Tokenizer, layers: int = 2) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            **_language_model(tokenizer, WIDTH, layers),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
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
        },
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in VISION_TOKENS.items()},
        tie_word_embeddings=True,
    )


def _qwen3(tokenizer: Qwen2Tokenizer, width: int, layers: int) -> Qwen3Config:
    return Qwen3Config(**_language_model(tokenizer, width, layers), head_dim=width // 2, tie_word_embeddings=True)


def _qwen3_vl(tokenizer: Qwen2Tokenizer, width: int, layers: int) -> Qwen3VLConfig:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [width // 4 - 2, 1, 1]}
    text = {**_language_model(tokenizer, width, layers), "head_dim": width // 2, "rope_parameters": rope}
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in VISION_TOKENS.items()}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **ids, tie_word_embeddings=True)


def _mistral3(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> Mistral3Config:
    text = {**_language_model(tokenizer, width, layers), "model_type": "mistral", "head_dim": width // 2}
    vision = {
        "model_type": "pixtral",
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    image = tokenizer.convert_tokens_to_ids("[IMG]")
    return Mistral3Config(text_config=text, vision_config=vision, image_token_id=image, spatial_merge_size=1)


def _language_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _flux2_transformer(guidance: bool) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * (WIDTH // 2),
        timestep_guidance_channels=32,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance,
    )
    # A prompt is the last few of many tokens. With smaller weights hardly anything of it reaches the picture.
    return randomize(transformer, std=0.4)


def _flux2_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def _flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    )
    nn.init.normal_(vae.bn.running_mean, std=0.2)
    nn.init.uniform_(vae.bn.running_var, 0.5, 1.5)
    return vae


def _klein_parts(scheduler: SchedulerMixin | None) -> dict[str, Any]:
    tokenizer = build_qwen_tokenizer([])
    return {
        "transformer": _flux2_transformer(guidance=False),
        "scheduler": scheduler or _flux2_scheduler(),
        "vae": _flux2_vae(),
        "text_encoder": randomize(Qwen3ForCausalLM(_qwen3(tokenizer, WIDTH // 2, layers=28))),
        "tokenizer": tokenizer,
    }


def _qwen_edit(pipeline: type[DiffusionPipeline], folder: Path, scheduler: SchedulerMixin | None, seed: int) -> Path:
    torch.manual_seed(seed)
    tokenizer = build_qwen_tokenizer([get_template(pipeline), "Picture 1: "])
    processor = Qwen2VLProcessor(_qwen_image_processor(), tokenizer, Qwen2VLVideoProcessor(patch_size=4), CHAT_TEMPLATE)
    saved = pipeline(
        # A million pixels become 1,024 tokens. With smaller weights hardly anything of a prompt would count beside them.
        transformer=_qwen_transformer(std=0.4),
        scheduler=scheduler or _qwen_scheduler(),
        vae=_qwen_vae(levels=5),
        text_encoder=randomize(Qwen2_5_VLForConditionalGeneration(_qwen25_vl(tokenizer))),
        tokenizer=tokenizer,
        processor=processor,
    )
    saved.save_pretrained(folder)
    return folder


def _qwen_image_processor() -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor(patch_size=4, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32})


def _qwen3_vl_processor(tokenizer: Qwen2Tokenizer) -> Qwen3VLProcessor:
    return Qwen3VLProcessor(_qwen_image_processor(), tokenizer, Qwen3VLVideoProcessor(patch_size=4), CHAT_TEMPLATE)


def _wan_parts(scheduler: SchedulerMixin | None) -> dict[str, Any]:
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=LATENTS_MEAN,
        latents_std=LATENTS_STD,
        scale_factor_spatial=2,
        scale_factor_temporal=2,
    )
    nn.init.normal_(vae.decoder.conv_out.weight, std=0.05)  # pixels inside [0, 1]
    flow = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    text = UMT5Config(vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {
        "scheduler": scheduler or flow,
        "vae": vae,
        "text_encoder": UMT5EncoderModel(text),
        "tokenizer": build_t5_tokenizer(),
    }


def _wan_transformer(in_channels: int = 4, image_dim: int | None = None) -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=image_dim,
    )
    return randomize(transformer, std=0.15)


LATENTS_MEAN, LATENTS_STD = [-0.3, 0.2, 0.1, -0.1], [1.2, 0.8, 1.1, 0.9]
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
    pipeline: type[DiffusionPipeline] | type[ModularPipeline]
    """The classic class of model_index.json. FLUX.3 has only a modular one."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of a call beside the prompt, generator and number of steps."""
    prompt: str = PROMPT
    slow: bool = False
    """Its tests take more than about 1.5 seconds."""


IMAGE = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
WAN_INPUTS = {
    "negative_prompt": NEGATIVE,
    "guidance_scale": 3.0,
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "max_sequence_length": 12,
}
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
    "z-image": Family(
        tiny_z_image,
        ZImagePipeline,
        {"negative_prompt": NEGATIVE, "guidance_scale": 3.0, "height": 16, "width": 16, "max_sequence_length": 32},
    ),
    "flux2-dev": Family(
        tiny_flux2, Flux2Pipeline, {"guidance_scale": 4.0, "height": 16, "width": 16, "max_sequence_length": 48}
    ),
    "flux2-klein": Family(
        tiny_flux2_klein,
        Flux2KleinPipeline,
        {"guidance_scale": 1.0, "height": 16, "width": 16, "max_sequence_length": 32},
    ),
    "flux2-klein-base": Family(
        tiny_flux2_klein_base,
        Flux2KleinPipeline,
        {"guidance_scale": 4.0, "height": 16, "width": 16, "max_sequence_length": 32},
    ),
    "ernie-image": Family(
        tiny_ernie_image,
        ErnieImagePipeline,
        {"negative_prompt": NEGATIVE, "guidance_scale": 4.0, "height": 16, "width": 16},
    ),
    "krea2": Family(
        tiny_krea2,
        Krea2Pipeline,
        {"negative_prompt": NEGATIVE, "guidance_scale": 3.0, "height": 32, "width": 32, "max_sequence_length": 32},
    ),
    "sd2-v": Family(
        tiny_sd2,
        StableDiffusionPipeline,
        {"negative_prompt": NEGATIVE, "guidance_scale": 3.0, "height": 8, "width": 8},
    ),
    "flux-kontext": Family(
        tiny_flux_kontext,
        FluxKontextPipeline,
        {
            "image": IMAGE,
            "guidance_scale": 2.5,
            "height": 16,
            "width": 16,
            "max_area": 16 * 16,
            "_auto_resize": False,
            "max_sequence_length": 12,
        },
    ),
    "qwen-image-2.1": Family(
        tiny_qwen_image_21,
        QwenImage21Pipeline,
        {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0, "height": 64, "width": 64, "use_kv_cache": False},
    ),
    "flux3": Family(tiny_flux3, Flux3ModularPipeline, {"negative_prompt": NEGATIVE, "height": 16, "width": 16}),
    "wan2.1-t2v": Family(tiny_wan21, WanPipeline, WAN_INPUTS),
    "wan2.2-t2v": Family(tiny_wan22, WanPipeline, WAN_INPUTS),
    "wan2.1-i2v": Family(tiny_wan_i2v, WanImageToVideoPipeline, {"image": IMAGE, **WAN_INPUTS}),
    "ltx": Family(
        tiny_ltx,
        LTXPipeline,
        {
            "negative_prompt": NEGATIVE,
            "guidance_scale": 3.0,
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "max_sequence_length": 12,
        },
    ),
    "hunyuan-video-1.5": Family(
        tiny_hunyuan_video,
        HunyuanVideo15Pipeline,
        {"negative_prompt": NEGATIVE, "height": 16, "width": 16, "num_frames": 5},
        prompt=PROMPT + ' "red"',
        slow=True,
    ),
}


def load(family: Family, folder: Path) -> Pipeline:
    """Return the saved pipeline as an instance of the family's class."""
    pipeline = family.pipeline.from_pretrained(folder)
    if isinstance(pipeline, ModularPipeline):
        blocks = pipeline.blocks
        blocks.sub_blocks.pop(
            "prompt_upsampler", None
        )  # prompts are encoded as given, not rewritten by a language model
        pipeline = blocks.init_pipeline(str(folder))
        pipeline.load_components()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: DiffusionPipeline | ModularPipeline, family: Family, *, seed: int = 0, steps: int = 2, **inputs: Any
) -> Tensor:
    """Return the images [B, C, H, W] or videos [B, F, C, H, W] in [0, 1] of a call. `inputs` replace the family's."""
    call = {"prompt": family.prompt, **family.inputs, **inputs, "num_inference_steps": steps, "output_type": "pt"}
    call["generator"] = torch.Generator().manual_seed(seed)
    drawn: Tensor
    drawn = pipeline(**call, output="images") if isinstance(pipeline, ModularPipeline) else pipeline(**call)[0]
    return drawn
