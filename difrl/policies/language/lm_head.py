"""Next-token distributions that are evaluated over the vocabulary a few tokens at a time.

A vocabulary has up to a quarter of a million elements, so log-softmax of a whole batch in float32 takes more memory than
the model. Here a distribution is stored as a hidden state, and only results are kept: the ℓ of a token, a divergence.
With gradient, each chunk is recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, D] -> logits [N, V]."""


@dataclass(frozen=True, eq=False)
class ChunkedLogits:
    """Distributions softmax(head(hidden) / temperature) of N tokens."""

    hidden: Tensor
    """[N, D]."""
    head: Head
    temperature: float
    chunk: int
    """Number of distributions in memory at once."""

    def logp(self, tokens: Tensor) -> Tensor:
        """Return log p of one token for each distribution, [N] int64 -> [N] float32."""

        def of(hidden: Tensor, chosen: Tensor) -> Tensor:
            logits = self.logits(hidden)
            return logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=1)

        return self._by_chunks(of, self.hidden, tokens)

    def divergence(self, other: ChunkedLogits, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return of(log p, log q) [N], p from self and q from other. `of` takes [n, V] each; gradients flow into self only."""

        def between(hidden: Tensor, reference: Tensor) -> Tensor:
            with torch.no_grad():
                log_q = other.logits(reference).log_softmax(dim=1)
            return of(self.logits(hidden).log_softmax(dim=1), log_q)

        return self._by_chunks(between, self.hidden, other.hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits divided by the temperature, float32."""
        return self.head(hidden).float() / self.temperature

    def _by_chunks(self, function: Callable[[Tensor, Tensor], Tensor], one: Tensor, other: Tensor) -> Tensor:
        pairs = zip(one.split(self.chunk), other.split(self.chunk), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([function(*pair) for pair in pairs])
        return torch.cat([cast(Tensor, checkpoint(function, *pair, use_reentrant=False)) for pair in pairs])


@dataclass(frozen=True, eq=False)
class CausalLM:
    """A causal language model of transformers, split into its body and its head."""

    model: Any
    dtype: torch.dtype
    """Precision of the passes. Trained weights are float32 in any case."""
    whole: bool
    """True if the head is more than one linear layer. Then logits take the place of hidden states."""

    @classmethod
    def build(cls, model: Any, dtype: torch.dtype) -> CausalLM:
        """Build the model, split if the head alone gives its logits for a few tokens. Some models scale or cap them.

        A model on the meta device has no logits to compare, and is not split.
        """
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear or model.device.type == "meta":
            return cls(model, dtype, whole=True)
        split = cls(model, dtype, whole=False)
        tokens = torch.arange(1, 3, device=model.device)[None]
        attention = torch.ones_like(tokens)
        with torch.no_grad(), split.autocast():
            hidden = split.hidden(tokens, attention)
            found = split.head()(hidden)
            expected = model(input_ids=tokens, attention_mask=attention).logits
        agrees = torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3)
        return split if agrees else cls(model, dtype, whole=True)

    def hidden(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """Return hidden states of tokens [B, T], [B, T, D]. Position i predicts token i + 1."""
        with self.autocast(), nullcontext() if self.whole else _passed_through(self.model.get_output_embeddings()):
            found: Tensor = self.model(input_ids=tokens, attention_mask=attention, use_cache=False).logits
        return found

    def head(self, *, fixed: bool = False) -> Head:
        """Return the function from hidden states to logits, to be called after `hidden`. fixed: keep a copy of its weights."""
        if self.whole:
            return lambda hidden: hidden
        layer = self.model.get_output_embeddings()
        weight, bias = layer.weight, layer.bias
        if fixed and (
            weight.requires_grad or isinstance(self.model, FSDPModule)
        ):  # an exchange, or FSDP2, changes them
            weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()

        def linear(hidden: Tensor) -> Tensor:
            with self.autocast():
                return F.linear(hidden, weight, bias)

        return linear

    @contextmanager
    def autocast(self, *, cached: bool = False) -> Iterator[None]:
        """Run passes in `dtype` inside the block.

        cached: keep the casts of trained weights, a second copy of them, for blocks that use each weight more than once.
        """
        half = self.dtype != torch.float32
        with torch.autocast(self.model.device.type, self.dtype, enabled=half, cache_enabled=cached):
            yield


@contextmanager
def _passed_through(head: Any) -> Iterator[None]:
    """Let a head return its hidden states inside the block. The model is called as a whole, as FSDP2 needs it."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward
