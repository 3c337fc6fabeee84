"""Sample completions from a causal language model of transformers, with noise that is keyed and not drawn.

The loop, the cache and the padding are those of `model.generate`. What is chosen is decided here: keyed Gumbel noise is
added to logits / temperature, and the greedy choice among them is a sample of softmax(logits / temperature). So a sample
does not depend, but for the order of float sums, on which other samples share its batch. Nothing of the model's own
generation_config (top_k, penalties, suppressed tokens, ...) takes part: the distribution that is sampled is the one that
can be scored and trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from samplers.gumbel import gumbel

# transformers takes seconds to import, so it is imported where it is called: `import samplers` stays light for images.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

Cache = Literal["dynamic", "static"]


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy, the distribution's limit."""
    cache: Cache = "dynamic"
    """static is allocated once at its full length, of which attention then always reads the whole."""
    eos: tuple[int, ...] = ()
    """Tokens that end a completion, each of them."""
    pad: int = 0
    """What stands left of shorter prompts and after the end; never attended to, may be one of `eos`."""

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
    """What was sampled, J = max_new_tokens, in the order of the prompts."""

    tokens: Tensor
    """[B, J] int64; `pad` outside the mask."""
    mask: Tensor
    """[B, J] bool: up to and including the first end token; all of a completion that ran out of room."""
    logp: Tensor
    """[B, J] float32: log-probability of each token under the distribution it was drawn from, at its temperature and
    after all processors; 0 outside the mask, and where the temperature is 0 (a greedy choice is certain)."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """A batch of prompts as the model sees them, padded on the left to one length P."""

    tokens: Tensor
    """[b, P] int64."""
    attention: Tensor
    """[b, P] int64: 1 at tokens, 0 at padding."""
    rows: Tensor
    """[b] int64: which of the prompts given to `generate` these are."""
    decoding: Decoding


class DecodingError(ValueError):
    """The model says no distribution of the next token."""


Processor = Callable[[Tensor, Tensor], Tensor]
"""(all tokens so far [b, P + position], scores [b, V] float32) -> scores [b, V], as transformers' own."""

Processing = Callable[[Prompts], Processor]
"""Makes the processor of a batch: one that keeps a cache or looks at the prompts is made anew for each."""


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    keys: Tensor,
    *,
    processors: Sequence[Processing] = (),
    batch: int = 64,
) -> Completions:
    """One completion for each of the B prompts (token ids), from the noise of its key.

    keys [B] int64: `sample_keys`. processors act on logits in their order, before the temperature. batch: prompts
    decoded together; they are sorted by length, so that few positions are padding. Without gradient. The model stays in
    the mode it is in: with dropout on, samples are not reproducible. ValueError: a prompt that is empty or does not fit
    into the model's context with max_new_tokens after it, or a model whose logits are not numbers.
    """
    _check(model, prompts, decoding, keys, batch)
    shape = (len(prompts), decoding.max_new_tokens)
    tokens = torch.full(shape, decoding.pad, dtype=torch.int64, device=model.device)
    logp = torch.zeros(shape, device=model.device)
    keys = keys.to(model.device)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with _without_defaults(model):
        for start in range(0, len(order), batch):
            some = _padded(prompts, order[start : start + batch], decoding, model.device)
            drawn, scored = _decode(model, some, keys[some.rows], [make(some) for make in processors])
            tokens[some.rows, : drawn.shape[1]] = drawn
            logp[some.rows, : drawn.shape[1]] = scored
    return _masked(tokens, logp, decoding)


def draw(logits: Tensor, temperature: float, keys: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Perturbed logits [b, V], whose argmax is a sample of softmax(logits / temperature), and that sample's logp [b].

    logits [b, V]. The Gumbel-max trick: P(argmax(a + g) = i) = softmax(a)_i. At temperature 0 the logits themselves.
    """
    scaled = logits if temperature == 0 else logits / temperature
    perturbed = scaled if temperature == 0 else scaled + gumbel(keys, position, logits.shape[1])
    chosen = scaled.gather(1, perturbed.argmax(dim=1, keepdim=True))
    # Greedily: log 1, and yet NaN where the logits are.
    total = chosen if temperature == 0 else scaled.logsumexp(dim=1, keepdim=True)
    return perturbed, (chosen - total)[:, 0]


@dataclass(frozen=True, eq=False)
class _Choice:
    """Chooses the tokens of a batch, as the one processor of `generate`, and keeps their log-probabilities.

    No function: transformers reads the signature of every processor's __call__ at every token, which takes a third of a
    millisecond where it is a function's.
    """

    prompts: Prompts
    keys: Tensor
    processors: Sequence[Processor]
    logp: list[Tensor] = field(default_factory=list)
    """[b] of each token."""

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        for process in self.processors:
            scores = process(tokens, scores)
        position = tokens.shape[1] - self.prompts.tokens.shape[1]
        perturbed, chosen = draw(scores, self.prompts.decoding.temperature, self.keys, position)
        self.logp.append(chosen)
        return perturbed


def _decode(
    model: PreTrainedModel, prompts: Prompts, keys: Tensor, processors: Sequence[Processor]
) -> tuple[Tensor, Tensor]:
    """Tokens and logp [b, j], j <= J: until all have ended."""
    from transformers import GenerationConfig, LogitsProcessorList

    decoding, choice = prompts.decoding, _Choice(prompts, keys, processors)
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        cache_implementation=decoding.cache,
        # A compiled pass may hold on to the storage of weights, which callers exchange between calls.
        disable_compile=True,
        eos_token_id=list(decoding.eos) or None,
        pad_token_id=decoding.pad,
    )
    tokens = model.generate(
        prompts.tokens,
        attention_mask=prompts.attention,
        generation_config=settings,
        logits_processor=LogitsProcessorList([choice]),
    )[:, prompts.tokens.shape[1] :]
    # On some devices generate looks one step further before it sees that all have ended.
    return tokens, torch.stack(choice.logp, dim=1)[:, : tokens.shape[1]]


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model has no generation settings of its own, from which generate fills in what we leave unset.

    Passing other values would not do: None is what switches most of them off, and None is what generate fills in.
    """
    from transformers import GenerationConfig

    # All owners: the model may be wrapped, and which of the modules generates is the wrapper's business.
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    kept = [module.generation_config for module in owners]
    try:
        for module in owners:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, own in zip(owners, kept, strict=True):
            module.generation_config = own


def _padded(prompts: Sequence[Sequence[int]], rows: Sequence[int], decoding: Decoding, device: torch.device) -> Prompts:
    """These rows, padded on the left."""
    length = max(len(prompts[row]) for row in rows)
    tokens = [[decoding.pad] * (length - len(prompts[row])) + list(prompts[row]) for row in rows]
    attention = [[0] * (length - len(prompts[row])) + [1] * len(prompts[row]) for row in rows]
    return Prompts(
        torch.tensor(tokens, dtype=torch.int64, device=device),
        torch.tensor(attention, dtype=torch.int64, device=device),
        torch.tensor(rows, dtype=torch.int64, device=device),
        decoding,
    )


def _masked(tokens: Tensor, logp: Tensor, decoding: Decoding) -> Completions:
    ends = torch.isin(tokens, torch.tensor(decoding.eos, dtype=torch.int64, device=tokens.device))
    mask = ends.cumsum(dim=1) - ends.long() == 0
    broken = (mask & ~logp.isfinite()).any(dim=1)
    if broken.any():
        raise DecodingError(
            f"the model's logits are not finite for prompt {int(broken.nonzero()[0])} ({int(broken.sum())} of "
            f"{len(broken)} prompts); its weights may have diverged, or its precision overflows: try float32 or bfloat16"
        )
    return Completions(torch.where(mask, tokens, decoding.pad), mask, torch.where(mask, logp, 0.0))


def _check(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], decoding: Decoding, keys: Tensor, batch: int
) -> None:
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    if keys.shape != (len(prompts),) or keys.dtype != torch.int64:
        raise ValueError(
            f"{len(prompts)} prompts need int64 keys of shape ({len(prompts)},), got {keys.dtype} {tuple(keys.shape)}; "
            "make them with sample_keys"
        )
    check_cache(model)
    check_prompts(model, prompts, decoding.max_new_tokens)


def check_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuses prompts that are empty, or do not fit into the model's context with max_new_tokens after them."""
    context = context_of(model)
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


def context_of(model: PreTrainedModel) -> float:
    """How many tokens the model can take, prompt and completion together."""
    # Models without a limit (recurrent ones, ALiBi) name none.
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")


def check_cache(model: PreTrainedModel) -> None:
    """Refuses a model that would quietly decode without its cache, and so every token without what came before it."""
    # Set on each layer by transformers; its own property of the whole model changes its name between versions.
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "a model in training mode with gradient checkpointing drops its cache and would decode every token without "
            "its context; call model.eval() first, or gradient_checkpointing_disable()"
        )
