"""Conversion between texts and the tokens of a language model, for prompts and completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from difrl.config import GenerationConfig
from difrl.data.jsonl import join_problems
from difrl.data.prompts import Prompt
from difrl.policies.errors import ModelError

REMEMBERED = 4096
"""Number of prompts whose tokens are cached."""
SHOWN_TEXT = 60
"""Characters of a prompt that a message shows."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with the settings of a run."""

    tokenizer: Any
    chat: bool
    """True if prompts go through the chat template."""
    system: str | None
    eos: tuple[int, ...]
    """Tokens that end a completion."""
    pad: int
    """Token that fills up short completions. It is masked everywhere."""
    max_new_tokens: int
    """Maximum length of a completion."""
    _encoded: Callable[[str], tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A step tokenizes a prompt once for each of its samples and each pass.
        object.__setattr__(self, "_encoded", lru_cache(maxsize=REMEMBERED)(self._encode))

    def tokenize_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the tokens of each prompt."""
        return [self.tokenize(prompt) for prompt in prompts]

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Return the tokens that precede a completion."""
        return list(self._encoded(prompt.text))

    def _encode(self, text: str) -> tuple[int, ...]:
        if not self.chat:
            return tuple(self.tokenizer(text)["input_ids"])
        messages = [{"role": "user", "content": text}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        whole = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tuple(self.tokenizer(whole, add_special_tokens=False)["input_ids"])  # the template has written them

    def validate_prompts(self, prompts: Sequence[Prompt], context: float) -> None:
        """Raise ModelError if a prompt has no tokens, or leaves no room for a completion in a context of this many tokens."""
        room = context - self.max_new_tokens
        problems = []
        for prompt in prompts:
            length = len(self.tokenize(prompt))
            where = prompt.place or f"the prompt {prompt.text[:SHOWN_TEXT]!r}"
            if length == 0:
                problems.append(
                    f"{where}: no tokens, but the first token of a completion needs one before it; remove the prompt"
                )
            elif length > room:
                problems.append(
                    f"{where}: {length} tokens, and with generation.max_new_tokens {self.max_new_tokens} the model's context of "
                    f"{context} leaves room for {room}; shorten it, or generate fewer"
                )
        if problems:
            raise ModelError(join_problems(problems, "prompts"))

    def tokenize_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of completions from other sources, each with an end token."""
        return [[*tokens, self.eos[0]] for tokens in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def validate_completions(self, texts: Sequence[str], places: Sequence[str]) -> None:
        """Raise ModelError if completions have no tokens before their end, or too many."""
        problems = []
        for tokens, place in zip(self.tokenize_completions(texts), places, strict=True):
            if len(tokens) == 1:
                problems.append(
                    f"{place}: a completion without tokens, expected at least one before its end; remove the row"
                )
            elif len(tokens) > self.max_new_tokens:
                problems.append(
                    f"{place}: a completion has {len(tokens)} tokens, its end included, and generation.max_new_tokens is "
                    f"{self.max_new_tokens}; raise it, or shorten the text"
                )
        if problems:
            raise ModelError(join_problems(problems, "completions"))

    def decode(self, tokens: Tensor, mask: Tensor) -> tuple[str, ...]:
        """Return completions as texts, without special tokens. tokens, mask: [B, J]."""
        rows = zip(tokens.tolist(), mask.tolist(), strict=True)
        kept = [[token for token, counts in zip(row, m, strict=True) if counts] for row, m in rows]
        return tuple(self.tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def build_texts(tokenizer: Any, generation: GenerationConfig) -> TextTokenizer:
    """Build the tokenizer of a recipe. Raise ModelError if neither the recipe nor the tokenizer has a required token."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if generation.chat and not has_template:
        raise ModelError("generation.chat: the tokenizer has no chat template; set false, or add one to the tokenizer")
    chat = has_template if generation.chat is None else generation.chat
    if generation.system is not None and not chat:
        raise ModelError("generation.system: prompts are taken as they are, without a chat template; remove it")
    eos = _get_ids(tokenizer, generation.eos, tokenizer.eos_token, "eos", "a completion could never end")
    pad = _get_ids(
        tokenizer, generation.pad and [generation.pad], tokenizer.pad_token, "pad", "short texts cannot be filled up"
    )
    return TextTokenizer(tokenizer, chat, generation.system, eos, pad[0], generation.max_new_tokens)


def _get_ids(tokenizer: Any, chosen: Sequence[str] | None, default: str | None, key: str, why: str) -> tuple[int, ...]:
    tokens = list(chosen or ([] if default is None else [default]))
    if not tokens:
        end = tokenizer.eos_token
        hint = (
            f", e.g. {end!r}: it is masked everywhere" if key == "pad" and end is not None else " to one of its tokens"
        )
        raise ModelError(f"the tokenizer has no {key} token, so {why}; set generation.{key}{hint}")
    vocabulary = tokenizer.get_vocab()
    if unknown := [token for token in tokens if token not in vocabulary]:
        raise ModelError(
            f"generation.{key}: {unknown[0]!r} is not among the {len(vocabulary)} tokens of the model; choose one of them"
        )
    return tuple(vocabulary[token] for token in tokens)


def pad_right(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Return tokens [B, length] padded on the right, and the mask of the real ones."""
    tokens = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], dtype=torch.int64)
    counts = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(length) < counts[:, None]
