"""Parts that the tiny image models share: sizes, tokenizer, and the configuration of a CLIP text encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer

LATENT_CHANNELS = 8
LATENT_SIZE = 8
MAX_TOKENS = 12
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """Return a CLIP tokenizer whose byte-pair merges join every word of the texts into a single token."""
    # The trainer numbers final letters in the order of a hash map, which differs from call to call. A killed pretraining
    # would then continue with permuted words. Passing them as special tokens fixes the order.
    endings = sorted({f"{word[-1]}</w>" for text in texts for word in text.split()})
    trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", special_tokens=[BOS, EOS, *endings], show_progress=False)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(sorted(set(texts)), trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in trained["merges"]]
    return CLIPTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def build_clip_config(tokenizer: CLIPTokenizer, width: int, **more: Any) -> CLIPTextConfig:
    """Return the configuration of a two-layer CLIP text encoder of the given width."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def zero_modules(model: nn.Module, endings: tuple[str, ...]) -> None:
    """Set weights and biases of the modules whose name has one of these endings to zero."""
    for name, module in model.named_modules():
        if name.endswith(endings):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
