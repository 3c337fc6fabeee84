"""Architecture of tiny-lm: a Qwen2 decoder of 0.69 million parameters that reads and writes single characters.

Model and tokenizer are transformers' own classes at a small size, so whatever works on tiny-lm goes through the code that
runs Qwen2. It is a base model: it has no chat template.
"""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from difrl.tasks import arithmetic

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
CONTEXT = 64
"""Number of tokens of the longest text, prompt included."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character and <bos> in front. Characters outside arithmetic become <unk>."""
    words = [PAD, BOS, EOS, UNK, *arithmetic.CHARACTERS]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """Return the untrained decoder in float32: four layers of width 128, two key-value heads for four query heads."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.07,  # 0.02 suits wider models and takes twice the steps here
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.max_new_tokens = arithmetic.LONGEST + 2  # <eos>, and one to spare
    return model
