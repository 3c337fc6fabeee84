"""Sample completions from a causal language model of transformers, with keyed noise.

The loop, the cache and the padding are those of `model.generate`. The choice of tokens is ours: keyed Gumbel noise is
added to logits / temperature, and the argmax of the sum is a sample of softmax(logits / temperature). So a sample does
not depend on the other samples of its batch, except through the order of float sums. The model's own generation_config
(top_k, penalties, suppressed tokens, ...) is not used, so that the sampled distribution is the one that is scored and
trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from samplers.gumbel import gumbel

# transformers takes seconds to import, so the functions that call it import it: `import samplers` stays light for images.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

Cache = Literal["dynamic", "static"]


@dataclass(frozen=True)
class Decoding:
    """Settings with which completions are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    """Divisor of the logits; 0 is greedy, the distribution's limit."""
    cache: Cache = "dynamic"
    """Kind of key-value cache. "static" is allocated once at its full length, and attention always reads all of it."""
    eos: tuple[int, ...] = ()
    """Tokens that end a completion: any one of them does."""
    pad: int = 0
    """Token left of shorter prompts and after the end. It is never attended to, and may be one of `eos`."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and 0 (greedy) or more, got {self.temperature}")
        if self.cache not in get_args(Cache):
            raise ValueError(f"cache must be one of {get_args(Cache)}, got {self.cache!r}")
        if min(self.pad, *self.eos, 0) < 0:
            raise ValueError(
                f"pad and eos must be token ids of 0 or more, got {self.pad} and {self.eos}; a tokenizer without a pad "
                "token can lend one of its end tokens"
            )


@dataclass(frozen=True, eq=False)
class Completions:
    """Sampled completions in the order of the prompts; J = max_new_tokens."""

    tokens: Tensor
    """[B, J] int64; `pad` outside the mask."""
    mask: Tensor
    """[B, J] bool: True up to and including the first end token, and everywhere in a completion without one."""
    logp: Tensor
    """[B, J] float32: log-probability of each token under the distribution it was drawn from, at its temperature and
    after all processors; 0 outside the mask, and at temperature 0 (a greedy choice is certain)."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """A batch of prompts as the model receives them, padded on the left to one length P."""

    tokens: Tensor
    """[b, P] int64."""
    attention: Tensor
    """[b, P] int64: 1 at tokens, 0 at padding."""
    rows: Tensor
    """[b] int64: positions of these prompts among the arguments of `generate`."""
    decoding: Decoding


class DecodingError(ValueError):
    """The model's logits are not a distribution over the next token."""


Processor = Callable[[Tensor, Tensor], Tensor]
"""(all tokens so far [b, P + position], scores [b, V] float32) -> scores [b, V], as transformers' own."""

Processing = Callable[[Prompts], Processor]
"""prompts of a batch -> their processor, which may thus keep a cache or read the prompts."""


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    keys: Tensor,
    *,
    processors: Sequence[Processing] = (),
    batch: int = 64,
    on_drawn: Callable[[int], object] | None = None,
) -> Completions:
    """Sample one completion for each of the B prompts (token ids), with the noise of its key. Without gradient.

    The model stays in its mode: in training mode with dropout, samples are not reproducible.

    Args:
      model: a causal language model of transformers.
      prompts: token ids of each prompt.
      decoding: length, temperature and special tokens.
      keys: [B] int64, from `sample_keys`.
      processors: applied to the logits in this order, before the temperature.
      batch: number of prompts decoded together. They are sorted by length, so that few positions are padding.
      on_drawn: called after each batch with the number of its completions.

    Raises:
      ValueError: if a prompt is empty or does not fit into the model's context with max_new_tokens after it.
      DecodingError: if the model's logits are not finite.
    """
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    if keys.shape != (len(prompts),) or keys.dtype != torch.int64:
        raise ValueError(
            f"{len(prompts)} prompts need int64 keys of shape ({len(prompts)},), got {keys.dtype} {tuple(keys.shape)}; "
            "make them with sample_keys"
        )
    check_cache(model)
    check_prompts(model, prompts, decoding.max_new_tokens)
    shape = (len(prompts), decoding.max_new_tokens)
    tokens = torch.full(shape, decoding.pad, dtype=torch.int64, device=model.device)
    logp = torch.zeros(shape, device=model.device)
    keys = keys.to(model.device)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with _without_defaults(model):
        for start in range(0, len(order), batch):
            part = _pad_left(prompts, order[start : start + batch], decoding, model.device)
            drawn, drawn_logp = _decode(model, part, keys[part.rows], [build(part) for build in processors])
            tokens[part.rows, : drawn.shape[1]] = drawn
            logp[part.rows, : drawn.shape[1]] = drawn_logp
            if on_drawn is not None:
                on_drawn(len(part.rows))
    return _cut_at_end(tokens, logp, decoding)


def perturb_logits(logits: Tensor, temperature: float, keys: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Return perturbed logits [b, V], whose argmax samples softmax(logits / temperature), and the sample's logp [b].

    logits [b, V]. The Gumbel-max trick: P(argmax(a + g) = i) = softmax(a)_i. At temperature 0 the logits are returned
    unperturbed.
    """
    scaled = logits if temperature == 0 else logits / temperature
    perturbed = scaled if temperature == 0 else scaled + gumbel(keys, position, logits.shape[1])
    chosen = scaled.gather(1, perturbed.argmax(dim=1, keepdim=True))
    # At temperature 0 this is log 1, but NaN where the logits are NaN.
    total = chosen if temperature == 0 else scaled.logsumexp(dim=1, keepdim=True)
    return perturbed, (chosen - total)[:, 0]


@dataclass(frozen=True, eq=False)
class _KeyedSampling:
    """The only processor of `generate`: it perturbs the logits of a batch and keeps the tokens' log-probabilities.

    A class, because transformers inspects the signature of every processor's __call__ at every token, which takes a
    third of a millisecond for a function.
    """

    prompts: Prompts
    keys: Tensor
    processors: Sequence[Processor]
    logp: list[Tensor] = field(default_factory=list)
    """Log-probabilities [b], one tensor for each token."""

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        for process in self.processors:
            scores = process(tokens, scores)
        position = tokens.shape[1] - self.prompts.tokens.shape[1]
        perturbed, logp = perturb_logits(scores, self.prompts.decoding.temperature, self.keys, position)
        self.logp.append(logp)
        return perturbed


def _decode(
    model: PreTrainedModel, prompts: Prompts, keys: Tensor, processors: Sequence[Processor]
) -> tuple[Tensor, Tensor]:
    """Return tokens and logp, [b, j] with j <= J: decoding stops once all completions have ended."""
    from transformers import GenerationConfig, LogitsProcessorList

    decoding, sampling = prompts.decoding, _KeyedSampling(prompts, keys, processors)
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        cache_implementation=decoding.cache,
        # A compiled pass may keep the storage of weights, which callers exchange between calls.
        disable_compile=True,
        eos_token_id=list(decoding.eos) or None,
        pad_token_id=decoding.pad,
    )
    tokens = model.generate(
        prompts.tokens,
        attention_mask=prompts.attention,
        generation_config=settings,
        logits_processor=LogitsProcessorList([sampling]),
    )[:, prompts.tokens.shape[1] :]
    # On some devices generate takes one more step before it notices that all have ended.
    return tokens, torch.stack(sampling.logp, dim=1)[:, : tokens.shape[1]]


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Remove the model's own generation settings inside the block, because generate would fill unset arguments from them.

    Passing values instead is not enough: None switches most settings off, and generate replaces exactly the None values.
    """
    from transformers import GenerationConfig

    # All owners: the model may be wrapped, and the wrapper decides which of its modules generates.
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    kept = [module.generation_config for module in owners]
    try:
        for module in owners:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, own in zip(owners, kept, strict=True):
            module.generation_config = own


def _pad_left(
    prompts: Sequence[Sequence[int]], rows: Sequence[int], decoding: Decoding, device: torch.device
) -> Prompts:
    """Return the batch of these rows, padded on the left."""
    length = max(len(prompts[row]) for row in rows)
    tokens = [[decoding.pad] * (length - len(prompts[row])) + list(prompts[row]) for row in rows]
    attention = [[0] * (length - len(prompts[row])) + [1] * len(prompts[row]) for row in rows]
    return Prompts(
        torch.tensor(tokens, dtype=torch.int64, device=device),
        torch.tensor(attention, dtype=torch.int64, device=device),
        torch.tensor(rows, dtype=torch.int64, device=device),
        decoding,
    )


def _cut_at_end(tokens: Tensor, logp: Tensor, decoding: Decoding) -> Completions:
    """Mask [B, J] tokens and logp after the first end token. DecodingError where a logp before it is not finite."""
    ends = torch.isin(tokens, torch.tensor(decoding.eos, dtype=torch.int64, device=tokens.device))
    mask = ends.cumsum(dim=1) - ends.long() == 0
    broken = (mask & ~logp.isfinite()).any(dim=1)
    if broken.any():
        raise DecodingError(
            f"the model's logits are not finite for prompt {int(broken.nonzero()[0])} ({int(broken.sum())} of "
            f"{len(broken)} prompts); its weights may have diverged, or its precision overflows: try float32 or bfloat16"
        )
    return Completions(torch.where(mask, tokens, decoding.pad), mask, torch.where(mask, logp, 0.0))


def check_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ValueError if a prompt is empty, or does not fit into the model's context with max_new_tokens after it."""
    context = get_context_length(model)
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"prompt {row} has no tokens, and the first token needs one to follow; begin prompts with the "
                "tokenizer's BOS token, or with text"
            )
        if len(prompt) > context - max_new_tokens:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens, and with max_new_tokens={max_new_tokens} the model's "
                f"context of {context} leaves room for {context - max_new_tokens}; shorten it, or generate fewer"
            )


def get_context_length(model: PreTrainedModel) -> float:
    """Return the maximum number of tokens of prompt and completion together; infinity for models without a limit."""
    # Recurrent models and ALiBi have no max_position_embeddings.
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")


def check_cache(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that would silently decode without its cache, each token without its context."""
    # transformers sets this attribute on each layer; the name of the whole model's property differs between versions.
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "a model in training mode with gradient checkpointing drops its cache and would decode every token without "
            "its context; call model.eval() first, or gradient_checkpointing_disable()"
        )
