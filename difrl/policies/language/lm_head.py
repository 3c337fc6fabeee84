"""Next-token distributions that are spelled out over the vocabulary a few tokens at a time.

A vocabulary has up to a quarter of a million elements, so log-softmax of a whole batch in float32 takes more memory than
the model. Here hidden states stand for distributions, and only what is asked of them is kept: a token's ℓ, a divergence.
With gradient each chunk is recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, D] -> logits [N, V]."""


@dataclass(frozen=True, eq=False)
class ChunkedLogits:
    """The distributions softmax(head(hidden) / temperature) of N tokens."""

    hidden: Tensor
    """[N, D]."""
    head: Head
    temperature: float
    chunk: int
    """Distributions that are spelled out at once."""

    def logp(self, tokens: Tensor) -> Tensor:
        """log p of one token each, [N] int64 -> [N] float32."""

        def of(hidden: Tensor, chosen: Tensor) -> Tensor:
            logits = self.logits(hidden)
            return logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=1)

        return self._by_chunks(of, self.hidden, tokens)

    def divergence(self, other: ChunkedLogits, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """of(log p, log q) [N] of these distributions and the other's, each given as [n, V]; no gradient in the other."""

        def between(hidden: Tensor, reference: Tensor) -> Tensor:
            with torch.no_grad():
                log_q = other.logits(reference).log_softmax(dim=1)
            return of(self.logits(hidden).log_softmax(dim=1), log_q)

        return self._by_chunks(between, self.hidden, other.hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the temperature, float32."""
        return self.head(hidden).float() / self.temperature

    def _by_chunks(self, function: Callable[[Tensor, Tensor], Tensor], one: Tensor, other: Tensor) -> Tensor:
        pairs = zip(one.split(self.chunk), other.split(self.chunk), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([function(*pair) for pair in pairs])
        return torch.cat([cast(Tensor, checkpoint(function, *pair, use_reentrant=False)) for pair in pairs])


@dataclass(frozen=True, eq=False)
class CausalLM:
    """A causal language model of transformers, as hidden states and a head."""

    model: Any
    dtype: torch.dtype
    """Of the passes; trained weights are float32 whatever it is."""
    whole: bool
    """Whether the head is more than one linear layer, and logits have to stand for hidden states."""

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype) -> CausalLM:
        """Tries on a few tokens whether the head alone makes logits of hidden states: some models scale or cap them."""
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            return cls(model, dtype, whole=True)
        split = cls(model, dtype, whole=False)
        tokens = torch.arange(1, 3, device=model.device)[None]
        attention = torch.ones_like(tokens)
        with torch.no_grad(), split.autocast():
            found = split.head()(split.hidden(tokens, attention))
            expected = model(input_ids=tokens, attention_mask=attention).logits
        agrees = torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3)
        return split if agrees else cls(model, dtype, whole=True)

    def hidden(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """Tokens [B, T] -> [B, T, D], of which position i says what follows token i."""
        with self.autocast():
            if self.whole:
                return self.model(input_ids=tokens, attention_mask=attention, use_cache=False).logits
            found = self.model.base_model(input_ids=tokens, attention_mask=attention, use_cache=False)
        return found.last_hidden_state

    def head(self, *, fixed: bool = False) -> Head:
        """From hidden states to logits. fixed: by the weights of this moment, also when others have taken their place."""
        if self.whole:
            return lambda hidden: hidden
        layer = self.model.get_output_embeddings()
        weight, bias = layer.weight, layer.bias
        if fixed:  # detach() keeps hold of the storage that the parameter has now; exchanging weights gives it another
            weight, bias = weight.detach(), None if bias is None else bias.detach()

        def linear(hidden: Tensor) -> Tensor:
            with self.autocast():
                return F.linear(hidden, weight, bias)

        return linear

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Inside the block passes run in `dtype`."""
        with torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield
