"""Random causal language models of a few thousand parameters, and their distributions without cache, padding or batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

CONTEXT = 32


def tiny_qwen2(vocabulary: int = 11, *, seed: int = 0) -> PreTrainedModel:
    """Return a model with rotary positions, and with large weights, so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).eval()


def tiny_gpt2(vocabulary: int = 11, *, seed: int = 0) -> PreTrainedModel:
    """Return a model with learnt absolute positions, and with dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=CONTEXT,
        initializer_range=0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def logits_after(model: PreTrainedModel, prefix: Sequence[int]) -> Tensor:
    """Return logits [V] float64 by one pass over the whole prefix alone."""
    return model(input_ids=torch.tensor([list(prefix)]), use_cache=False).logits[0, -1].double()


def sequences(vocabulary: int, length: int) -> Tensor:
    """Return all sequences, [V^J, J], in the order of their numbers in base V."""
    return torch.tensor(list(product(range(vocabulary), repeat=length)))


@torch.no_grad()
def next_logp(model: PreTrainedModel, prompt: Sequence[int], every: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities [N, J, V] float64 of the token after the prompt and the first j tokens of every [N, J]."""
    whole = torch.cat([torch.tensor([list(prompt)]).expand(len(every), -1), every], dim=1)
    logits = model(input_ids=whole, use_cache=False).logits[:, len(prompt) - 1 : -1].double()
    return (logits / temperature).log_softmax(dim=2)


def sequence_logp(logp: Tensor, every: Tensor) -> Tensor:
    """Return the log-probability of each sequence [N, J], [N] float64, from those of all next tokens [N, J, V]."""
    return logp.gather(2, every[:, :, None])[:, :, 0].sum(dim=1)


def sequence_number(tokens: Tensor, vocabulary: int) -> Tensor:
    """Return the position in `sequences` of each row of tokens [B, J], [B]."""
    powers = vocabulary ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return (tokens * powers).sum(dim=1)
