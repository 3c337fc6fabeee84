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
    """Tokens that end a completion: any one of them does."""
    end: int
    """The token of `eos` that is put after a completion from another source."""
    hidden: frozenset[int]
    """Tokens that a text does not show at its end, beside the tokenizer's special ones."""
    appended: int
    """Number of tokens that the tokenizer adds after a text. Prompts are without them, since a completion follows."""
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
            tokens = self.tokenizer(text)["input_ids"]
            return tuple(tokens[: len(tokens) - self.appended])
        whole = _apply_template(self.tokenizer, text, self.system)
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
        """Return the tokens of completions from other sources, each with one end token: its own, or the usual one."""
        found = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [[*tokens] if tokens and tokens[-1] in self.eos else [*tokens, self.end] for tokens in found]

    def validate_completions(self, texts: Sequence[str], places: Sequence[str]) -> None:
        """Raise ModelError if completions have no tokens before their end, too many, or the same ones as their pair."""
        problems, pairs = [], dict[str, list[int]]()
        for tokens, place in zip(self.tokenize_completions(texts), places, strict=True):
            if len(tokens) == 1:
                problems.append(
                    f"{place}: a completion without tokens, expected at least one before its end; remove the row"
                )
            elif early := [token for token in tokens[:-1] if token in self.eos]:
                end = self.tokenizer.convert_ids_to_tokens(early[0])
                problems.append(
                    f"{place}: a completion has the end token {end!r} before its end, where drawn ones stop; remove what "
                    "follows it, or divide the row"
                )
            elif len(tokens) > self.max_new_tokens:
                problems.append(
                    f"{place}: a completion has {len(tokens)} tokens, its end included, and generation.max_new_tokens is "
                    f"{self.max_new_tokens}; raise it, or shorten the text"
                )
            elif pairs.setdefault(place, tokens) == tokens and pairs[place] is not tokens:
                problems.append(f"{place}: both completions have the same tokens, so neither is better; remove the row")
        if problems:
            raise ModelError(join_problems(problems, "completions"))

    def decode(self, tokens: Tensor, mask: Tensor) -> tuple[str, ...]:
        """Return completions as texts, without special tokens. tokens, mask: [B, J]."""
        rows = zip(tokens.tolist(), mask.tolist(), strict=True)
        kept = [[token for token, counts in zip(row, m, strict=True) if counts] for row, m in rows]
        kept = [row[:-1] if row and row[-1] in self.hidden else row for row in kept]
        return tuple(self.tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @property
    def notes(self) -> list[str]:
        """Facts about the tokens that a user may not expect."""
        name = self.tokenizer.convert_ids_to_tokens
        notes = [f"completions end at {' or '.join(repr(name(token)) for token in self.eos)}"]
        if self.appended:
            added = " ".join(name(self.tokenizer(_PROBE)["input_ids"][-self.appended :]))
            notes.append(f"prompts are without {added}, which the tokenizer adds after a text")
        return notes


def build_texts(tokenizer: Any, generation: GenerationConfig, ends: Sequence[int] = ()) -> TextTokenizer:
    """Build the tokenizer of a recipe. Raise ModelError if neither the recipe nor the model has a required token.

    ends: tokens that end a text by the model's own configuration. The tokenizer's and these do, unless the recipe has others.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if generation.chat and not has_template:
        raise ModelError("generation.chat: the tokenizer has no chat template; set false, or add one to the tokenizer")
    chat = has_template if generation.chat is None else generation.chat
    if generation.system is not None and not chat:
        raise ModelError("generation.system: prompts are taken as they are, without a chat template; remove it")
    if chat:
        _check_template(tokenizer, generation.system)
    eos = _get_ends(tokenizer, generation.eos, ends)
    pad = _get_ids(
        tokenizer, generation.pad and [generation.pad], tokenizer.pad_token, "pad", "short texts cannot be filled up"
    )
    return TextTokenizer(
        tokenizer,
        chat,
        generation.system,
        eos,
        _find_turn_end(tokenizer, eos) if chat else eos[0],
        frozenset(eos) if generation.eos is None else frozenset(),
        0 if chat else _count_appended(tokenizer),
        pad[0],
        generation.max_new_tokens,
    )


_PROBE = "1"
_SYSTEM, _USER, _ASSISTANT = "instruction", "question", "answer"
"""Contents of messages by which a chat template is tried."""


def _apply_template(tokenizer: Any, text: str, system: str | None, answer: str | None = None) -> str:
    """Return a conversation as the chat template writes it, up to the place of the answer or with it. Raise ModelError."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    try:
        whole: str = tokenizer.apply_chat_template(messages, add_generation_prompt=answer is None, tokenize=False)
    except Exception as error:  # a template is a program: it raises errors of jinja2 and of Python
        roles = ", ".join(message["role"] for message in messages)
        raise ModelError(
            f"generation.chat: the tokenizer's chat template cannot write messages of {roles}: {error}; set "
            "generation.chat: false, or repair the template"
        ) from error
    return whole


def _check_template(tokenizer: Any, system: str | None) -> None:
    """Raise ModelError for a chat template that does not write the messages of a run."""
    if _USER not in _apply_template(tokenizer, _USER, None):
        raise ModelError(
            "generation.chat: the tokenizer's chat template leaves the prompt out; set generation.chat: false, or repair the "
            "template"
        )
    if system is None:
        return
    problem = "generation.system: the model's chat template has no system message"
    advice = "remove it, or write the instruction into the prompts"
    try:
        whole = _apply_template(tokenizer, _USER, _SYSTEM)
    except ModelError as error:
        raise ModelError(f"{problem} ({error.__cause__}); {advice}") from error
    if _SYSTEM not in whole:
        raise ModelError(f"{problem}: it leaves out what it is given; {advice}")


def _find_turn_end(tokenizer: Any, eos: Sequence[int]) -> int:
    """Return the end token that the chat template writes after an answer; the first one if it writes none."""
    try:
        whole = _apply_template(tokenizer, _USER, None, _ASSISTANT)
    except ModelError:  # a template for prompts only
        return eos[0]
    rest = tokenizer(whole.rpartition(_ASSISTANT)[2], add_special_tokens=False)["input_ids"]
    return next((token for token in rest if token in eos), eos[0])


def _count_appended(tokenizer: Any) -> int:
    """Return the number of tokens that the tokenizer's post-processor adds after a text, such as an end token."""
    whole, plain = (tokenizer(_PROBE, add_special_tokens=special)["input_ids"] for special in (True, False))
    before = [i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain]
    return len(whole) - before[-1] - len(plain) if before else 0


def _get_ends(tokenizer: Any, chosen: Sequence[str] | None, ends: Sequence[int]) -> tuple[int, ...]:
    if chosen is None and ends:
        own = [] if tokenizer.eos_token is None else [tokenizer.get_vocab()[tokenizer.eos_token]]
        return tuple(dict.fromkeys([*own, *ends]))
    return _get_ids(tokenizer, chosen, tokenizer.eos_token, "eos", "a completion could never end")


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
