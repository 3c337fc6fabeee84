"""Rewards of the form of a text, whatever its content: a pattern, and a length."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rewards.base import Metadata, Samples, Scores, WithoutDevice, all_valid, check_texts
from rewards.options import check_at_least_one
from rewards.patterns import compile_pattern
from rewards.sources import resolve_source
from rewards.workers import call_each


class Format(WithoutDevice):
    """1 if the regular expression `pattern` matches the whole text, else 0.

    seconds: limit for a text, in seconds of computing; a text that needs longer is invalid.
    """

    name = "format"
    needs: tuple[str, ...] = ("texts",)

    def __init__(self, *, pattern: str, seconds: int = 5) -> None:
        check_at_least_one(self.name, seconds=seconds)
        self.pattern, self.seconds = compile_pattern(pattern, "reward 'format': pattern").pattern, seconds

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score B texts; prompts and metadata are not used."""
        calls = [(self.pattern, text, True) for text in check_texts(samples, self.name)]
        return Scores.from_list(call_each("rewards.patterns:matches", calls, self.seconds, self.name))


class Length(WithoutDevice):
    """0 up to `longest` − `margin` characters or tokens, falling to −1 at `longest` (DAPO).

    It is DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13): −clip((|y| − (longest − margin)) / margin, 0, 1), with
    the length |y| in tokens of `tokenizer`, or in characters without one.
    """

    name = "length"
    needs: tuple[str, ...] = ("texts",)

    def __init__(self, *, longest: int, margin: int, tokenizer: str | None = None) -> None:
        if not 0 < margin <= longest:
            raise ValueError(f"reward 'length': margin is {margin}, expected 1 to longest, which is {longest}")
        self.longest, self.margin, self.tokenizer = longest, margin, tokenizer

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score B texts; prompts and metadata are not used."""
        lengths = torch.tensor([self.count(text) for text in check_texts(samples, self.name)])
        return all_valid(-((lengths - (self.longest - self.margin)) / self.margin).clamp(0, 1))

    @functools.cached_property
    def count(self) -> Callable[[str], int]:
        """A function from a text to its length in characters, or in tokens of `tokenizer`."""
        if self.tokenizer is None:
            return len
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(resolve_source(self.tokenizer))
        return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
