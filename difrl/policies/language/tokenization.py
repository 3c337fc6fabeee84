"""Between texts and the tokens of a language model: prompts, completions, and where a completion ends."""

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
"""Prompts whose tokens are kept."""
SHOWN_TEXT = 60
"""Characters of a prompt by which a message names it."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer, and how a run uses it."""

    tokenizer: Any
    chat: bool
    """Whether prompts go through the chat template."""
    system: str | None
    eos: tuple[int, ...]
    """Any of these ends a completion."""
    pad: int
    """Fills up short completions; it is masked everywhere."""
    max_new_tokens: int
    """Tokens of a completion."""
    _encoded: Callable[[str], tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A step asks for a prompt once for each of its samples and each pass.
        object.__setattr__(self, "_encoded", lru_cache(maxsize=REMEMBERED)(self._encode))

    def tokenize_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The tokens of each."""
        return [self.tokenize(prompt) for prompt in prompts]

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The tokens that a completion follows."""
        return list(self._encoded(prompt.text))

    def _encode(self, text: str) -> tuple[int, ...]:
        if not self.chat:
            return tuple(self.tokenizer(text)["input_ids"])
        messages = [{"role": "user", "content": text}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        whole = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tuple(self.tokenizer(whole, add_special_tokens=False)["input_ids"])  # which the template has written

    def validate_prompts(self, prompts: Sequence[Prompt], context: float) -> None:
        """ModelError if a prompt has no tokens, or leaves too little of a context of so many for a completion."""
        room = context - self.max_new_tokens
        problems = []
        for prompt in prompts:
            length = len(self.tokenize(prompt))
            where = prompt.place or f"the prompt {prompt.text[:SHOWN_TEXT]!r}"
            if length == 0:
                problems.append(
                    f"{where}: no tokens, and the first token of a completion needs one to follow; remove it"
                )
            elif length > room:
                problems.append(
                    f"{where}: {length} tokens, and with generation.max_new_tokens {self.max_new_tokens} the model's context of "
                    f"{context} leaves room for {room}; shorten it, or generate fewer"
                )
        if problems:
            raise ModelError(join_problems(problems, "prompts"))

    def tokenize_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of completions that were written elsewhere, each with an end."""
        return [[*tokens, self.eos[0]] for tokens in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def validate_completions(self, texts: Sequence[str], places: Sequence[str]) -> None:
        """ModelError names the completions that have no tokens before their end, or too many."""
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
        """Completions as texts, without special tokens. tokens, mask: [B, J]."""
        rows = zip(tokens.tolist(), mask.tolist(), strict=True)
        kept = [[token for token, counts in zip(row, m, strict=True) if counts] for row, m in rows]
        return tuple(self.tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def build_texts(tokenizer: Any, generation: GenerationConfig) -> TextTokenizer:
    """The tokenizer as a recipe uses it; ModelError where it lacks what the recipe does not say either."""
    template = getattr(tokenizer, "chat_template", None) is not None
    if generation.chat and not template:
        raise ModelError("generation.chat: the tokenizer has no chat template; set false, or add one to the tokenizer")
    chat = template if generation.chat is None else generation.chat
    if generation.system is not None and not chat:
        raise ModelError("generation.system: prompts are taken as they are, without a chat template; remove it")
    eos = _ids(tokenizer, generation.eos, tokenizer.eos_token, "eos", "a completion could never end")
    pad = _ids(
        tokenizer, generation.pad and [generation.pad], tokenizer.pad_token, "pad", "short texts cannot be filled up"
    )
    return TextTokenizer(tokenizer, chat, generation.system, eos, pad[0], generation.max_new_tokens)


def _ids(tokenizer: Any, said: Sequence[str] | None, own: str | None, key: str, why: str) -> tuple[int, ...]:
    tokens = list(said or ([] if own is None else [own]))
    if not tokens:
        end = tokenizer.eos_token
        hint = (
            f", e.g. {end!r}: it is masked everywhere" if key == "pad" and end is not None else " to one of its tokens"
        )
        raise ModelError(f"the tokenizer has no {key} token, so {why}; set generation.{key}{hint}")
    vocabulary = tokenizer.get_vocab()
    if unknown := [token for token in tokens if token not in vocabulary]:
        raise ModelError(f"generation.{key}: {unknown[0]!r} is no token of the model's {len(vocabulary)}")
    return tuple(vocabulary[token] for token in tokens)


def pad_right(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, length] filled up on the right, and the mask of what they hold."""
    tokens = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], dtype=torch.int64)
    counts = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(length) < counts[:, None]
