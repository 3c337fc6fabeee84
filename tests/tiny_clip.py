"""Random CLIP models of a few thousand parameters in the published formats of transformers and open_clip, for tests."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

SIZE = 32  # of the pictures that the models take
ARCHITECTURE = "tiny-clip-of-tests"


def tiny_clip(folder: Path, *, width: int = 16, seed: int = 0) -> Path:
    """Save a random CLIPModel with its processor, whose tokenizer spells: one token a character, 77 at most."""
    torch.manual_seed(seed)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config={**tower, **ends, "vocab_size": len(words), "max_position_embeddings": 77},
        vision_config={**tower, "image_size": SIZE, "patch_size": 8},
        projection_dim=width,
    )
    model = CLIPModel(config)
    _spread(model)
    model.save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    pictures = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def tiny_open_clip(folder: Path, *, seed: int = 0) -> Path:
    """Save the random weights of `ARCHITECTURE`, which becomes known to open_clip, as HPSv2's are published."""
    import open_clip

    config = folder / f"{ARCHITECTURE}.json"
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}), encoding="utf-8")
    open_clip.add_model_config(config)
    torch.manual_seed(seed)
    model = open_clip.create_model(ARCHITECTURE)
    _spread(model)
    checkpoint = folder / "HPS_v2.1_compressed.pt"
    # In half precision, as the published file.
    state = {name: value.half() for name, value in model.state_dict().items()}
    torch.save({"epoch": 1, "name": "tiny", "state_dict": state}, checkpoint)
    return checkpoint


def random_images(count: int, height: int = 40, width: int = 56, seed: int = 0) -> Tensor:
    """Smooth images [count,3,height,width] in [0,1], in 8 bits, so that resizing changes little and order much."""
    coarse = torch.rand(count, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return (fine * 255).round() / 255


def _spread(model: nn.Module) -> None:
    """Weights large enough that different pictures and words get different embeddings, and a scale of 50."""
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
        elif name == "logit_scale":
            nn.init.constant_(p, math.log(50.0))
