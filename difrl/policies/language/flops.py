"""The cost of evaluating a text by a language model, counted without weights, for `difrl check`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from difrl.config import ModelConfig
from difrl.policies.errors import ModelError
from difrl.policies.flops import Cost, count_call_cost
from difrl.policies.model_paths import LANGUAGE_MODEL, resolve
from difrl.runtime.dtypes import DTYPES


def build_language_skeleton(path: str, revision: str | None, model: ModelConfig, key: str = "model.path") -> Any:
    """Build the model as load_frozen would, on the meta device. Raise ModelError if its config.json cannot be used."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = resolve(path, LANGUAGE_MODEL, key)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        with torch.device("meta"):
            found = AutoModelForCausalLM.from_config(config, dtype=DTYPES[model.dtype], attn_implementation="sdpa")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{key}: {path} cannot be built from its config.json ({type(error).__name__}: {error}); expected a causal "
            "language model of transformers"
        ) from error
    return found.requires_grad_(False).eval()


@dataclass(frozen=True)
class TextCost:
    """The cost of one text. The head is separate, since it is evaluated at the completion's tokens alone."""

    body: Cost
    head: int
    """FLOPs of the logits of one token: 2 × width × vocabulary."""
    logits: int
    """Bytes of the logits of one token in float32."""
    cache: int
    """Bytes of the keys and values of a text."""


def count_text_cost(network: Any, length: int, dtype: torch.dtype, recompute: bool) -> TextCost:
    """Count the cost on a skeleton. Its weights are cast to `dtype` in place, as autocast would do in a pass."""
    nn.Module.to(network, dtype)
    body, head = network.base_model, network.get_output_embeddings()
    tokens = torch.zeros(1, length, dtype=torch.int64, device="meta")
    # transformers reads the values of a two-dimensional mask, and meta tensors have none; four dimensions pass unread.
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
    with torch.no_grad():
        kept = body(input_ids=tokens, attention_mask=mask, use_cache=True).past_key_values

    def call() -> Tensor:
        hidden: Tensor = body(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden

    # Layers of transformers recompute their activations in training mode only.
    body.train(recompute)
    return TextCost(
        count_call_cost(body, call, partial(network._set_gradient_checkpointing, True) if recompute else None),
        2 * sum(p.numel() for p in head.parameters() if p.dim() == 2),
        4 * head.weight.shape[0],
        sum(t.nbytes for layer in kept.layers for t in (layer.keys, layer.values)),
    )
