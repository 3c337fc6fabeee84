"""Random detectors of a few thousand parameters, saved like published checkpoints: weights, config, processor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    SwinConfig,
)

LABELS = {0: "cat", 1: "motorbike", 2: "tvmonitor"}


def mask2former(folder: Path) -> Path:
    """Save a model for instance segmentation with masks for 12 queries."""
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=_swin(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        id2label=LABELS,
    )
    _save(Mask2FormerForUniversalSegmentation(config), folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32).save_pretrained(folder)
    return folder


def detr(folder: Path) -> Path:
    """Save a DETR for object detection: a softmax with a class for no object."""
    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"], layer_type="basic"
    )
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=6,
        id2label=LABELS,
    )
    _save(DetrForObjectDetection(config), folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


def rt_detr(folder: Path) -> Path:
    """Save an RT-DETR for object detection: a sigmoid for each class."""
    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[16, 16, 16],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_queries=10,
        id2label=LABELS,
    )
    _save(RTDetrForObjectDetection(config), folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def owlv2(folder: Path) -> Path:
    """Save an OWLv2 for zero-shot detection with a query for each class."""
    torch.manual_seed(0)
    text = {**_text(), "max_position_embeddings": 32}
    vision = {**_vision(), "image_size": 64, "patch_size": 16}
    _save(Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)), folder)
    images = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    tokenizer = _clip_tokenizer(folder, length=32, pad="!")
    Owlv2Processor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def grounding_dino(folder: Path) -> Path:
    """Save a Grounding DINO for zero-shot detection with a phrase for each class. [CLS], [SEP] and “.” are BERT's tokens."""
    torch.manual_seed(0)
    vocabulary = [f"[unused{index}]" for index in range(1040)]
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}
    words = {1: "cat", 2: "tv", 3: "remote", 4: "red", 5: "dog"}
    for index, word in {**special, **words}.items():
        vocabulary[index] = word
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = GroundingDinoConfig(
        backbone_config=_swin(),
        text_config=BertConfig(
            vocab_size=1040, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=8,
        max_text_len=32,
    )
    _save(GroundingDinoForObjectDetection(config), folder)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"))
    GroundingDinoProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def _save(model: torch.nn.Module, folder: Path) -> None:
    # Libraries start many layers at zero or nearly so; random ones make every input and every class matter.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


def _swin() -> SwinConfig:
    return SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def _text() -> dict[str, int]:
    ends = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    return {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, **_heads(), **ends}


def _vision() -> dict[str, int]:
    return {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, **_heads()}


def _heads() -> dict[str, int]:
    return {"num_attention_heads": 2}


def _clip_tokenizer(folder: Path, length: int, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return a tokenizer with one token a character, and separate tokens for the ends of words."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [f"<unused{index}>" for index in range(256 - len(tokens))] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=length, pad_token=pad
    )
