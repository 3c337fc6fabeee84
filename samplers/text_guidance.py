"""RLG for text: blend the logits of a base and of a tuned model token by token, while completions are drawn.

Under each prefix pi_w(y_j | y_<j) ~ pi_base^(1-w) pi_tuned^w (2508.21016's blend of scores, on logits). Where
pi_tuned ~ pi_base exp(r / beta) this is pi_base exp(w r / beta) for completions of one token. It is not for longer ones:
the tilted distribution of sequences weighs a prefix by its continuations, and the product over prefixes does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from samplers.guidance import PerSample
from samplers.text import Processor, Prompts, check_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def blend(base: Tensor, tuned: Tensor, weight: float) -> Tensor:
    """Return (1 - w) base + w tuned for logits [b, V]: the blend of the log-probabilities up to a constant a row.

    Softmax drops the constant, and a temperature divides both models' logits alike. So logits may be normalised and
    divided before or after the blend: pi_w at temperature T blends pi_base and pi_tuned at T.
    """
    if base.shape != tuned.shape:
        raise ValueError(
            f"the base model has logits for {base.shape[1]} tokens, the tuned one for {tuned.shape[1]}; RLG blends models "
            "of one vocabulary: load the base with the tuned model's tokenizer and size of embeddings"
        )
    return torch.lerp(base, tuned, weight)


class BaseDivergence:
    """KL(pi_w || pi_base) of the next token at the temperature, exact under each prefix and summed over a sample's tokens.

    Its mean over samples estimates KL(pi_w || pi_base) of whole completions. At temperature 0, where that is infinite,
    the two distributions are those of temperature 1. Use one object for one call of `generate`: samples are its rows.
    """

    def __init__(self) -> None:
        self._sums, self._tokens = PerSample(), PerSample()

    def add(self, prompts: Prompts, tokens: Tensor, base: Tensor, guided: Tensor) -> None:
        """Add the KL of the next token after tokens [b, P + j], from logits [b, V]. Ended completions are skipped."""
        temperature = prompts.decoding.temperature or 1.0
        log_w = (guided / temperature).log_softmax(dim=1)
        log_base = (base / temperature).log_softmax(dim=1)
        # A token of probability 0 counts 0, not 0 times infinity.
        divergence = torch.where(log_w > -torch.inf, log_w.exp() * (log_w - log_base), 0.0).sum(dim=1)
        ends = torch.tensor(prompts.decoding.eos, dtype=torch.int64, device=tokens.device)
        running = ~torch.isin(tokens[:, prompts.tokens.shape[1] :], ends).any(dim=1)
        self._sums.add(prompts.rows, torch.where(running, divergence, 0.0))
        self._tokens.add(prompts.rows, running)

    def sums(self, count: int) -> Tensor:
        """Return each sample's sum over its tokens, the end token included, [count] float64."""
        return self._sums.sums(count)

    def tokens(self, count: int) -> Tensor:
        """Return the number of tokens that each sample was measured at, [count] float64."""
        return self._tokens.sums(count)


@dataclass(frozen=True, eq=False)
class TextGuidance:
    """RLG as the first of the `processors` of `generate(tuned, ...)`: it needs the tuned model's own logits.

    Two evaluations a token. At w = 1, and for the `first_tokens`, there is one unless a divergence is measured: the base
    is skipped, and reads the skipped tokens in one pass later. For w = 0 pass the base to `generate` instead.
    """

    base: PreTrainedModel
    """The base model. Its forward pass must take position_ids. It has a dynamic cache of its own."""
    weight: float
    """w: 0 is the base, 1 the tuned model, above 1 extrapolates."""
    base_context: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered around every pass of `base`. Where `base` is the tuned model itself, it turns that into the base, for example
    by switching off an adapter. Weights exchanged here are exchanged twice a token."""
    first_tokens: int = 0
    """Number of tokens at w = 1 before RLG begins."""
    divergence: BaseDivergence | None = None
    """KL measurement of pi_w, also at w = 1, where it costs one more evaluation a token."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.first_tokens < 0:
            raise ValueError(
                f"RLG needs a finite weight and first_tokens of 0 or more, got {self.weight} and {self.first_tokens}"
            )

    def __call__(self, prompts: Prompts) -> Processor:
        """Build the processor of one batch."""
        base = IncrementalLogits(self.base, self.base_context, prompts)

        def guide(tokens: Tensor, scores: Tensor) -> Tensor:
            position = tokens.shape[1] - prompts.tokens.shape[1]
            weight = 1.0 if position < self.first_tokens else self.weight
            if weight == 1 and self.divergence is None:
                return scores
            reference = base(tokens)
            guided = blend(reference, scores, weight)
            if self.divergence is not None:
                self.divergence.add(prompts, tokens, reference, guided)
            return guided

        return guide


class IncrementalLogits:
    """Next-token logits of a model for the tokens that another model decodes, with a cache of its own."""

    def __init__(
        self, model: PreTrainedModel, context: Callable[[], AbstractContextManager[object]], prompts: Prompts
    ) -> None:
        check_cache(model)
        self.model, self.context = model, context
        self.attention = prompts.attention
        self.cache: object = None
        self.seen = 0

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Return logits [b, V] float32 after tokens [b, P + j]. The model reads the tokens added since the last call."""
        missing = tokens.shape[1] - self.attention.shape[1]
        self.attention = torch.nn.functional.pad(self.attention, (0, missing), value=1)
        # The numbering of generate: padding has no position of its own.
        positions = (self.attention.cumsum(dim=1) - 1).clamp(min=0)
        with self.context():
            output = self.model(
                input_ids=tokens[:, self.seen :],
                attention_mask=self.attention,
                position_ids=positions[:, self.seen :],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache, self.seen = output.past_key_values, tokens.shape[1]
        logits: Tensor = output.logits[:, -1].float()
        return logits
