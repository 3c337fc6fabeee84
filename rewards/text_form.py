"""The form of a text, whatever it says: whether it follows a pattern, and whether it is too long."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rewards.base import Metadata, Samples, Scores, all_valid, check_texts
from rewards.math_answers import compiled


class Format:
    """1 if the regular expression `pattern` matches the whole text, else 0."""

    name = "format"
    needs: tuple[str, ...] = ("texts",)

    def __init__(self, *, pattern: str) -> None:
        self.pattern = compiled(pattern, "reward 'format': pattern")

    def to(self, device: torch.device | str) -> Format:
        """Nothing to move."""
        return self

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score B texts; prompts and metadata are not read."""
        matches = [self.pattern.fullmatch(text) is not None for text in check_texts(samples, self.name)]
        return all_valid(torch.tensor(matches))


class Length:
    """0 up to `longest` − `margin` characters (or tokens of `tokenizer`), falling to −1 at `longest`: DAPO's punishment.

    DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13) is −clip((|y| − (longest − margin)) / margin, 0, 1).
    """

    name = "length"
    needs: tuple[str, ...] = ("texts",)

    def __init__(self, *, longest: int, margin: int, tokenizer: str | None = None) -> None:
        if not 0 < margin <= longest:
            raise ValueError(f"reward 'length': margin is {margin}, expected 1 to longest, which is {longest}")
        self.longest, self.margin, self.tokenizer = longest, margin, tokenizer

    def to(self, device: torch.device | str) -> Length:
        """Nothing to move."""
        return self

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score B texts; prompts and metadata are not read."""
        lengths = torch.tensor([self.count(text) for text in check_texts(samples, self.name)])
        return all_valid(-((lengths - (self.longest - self.margin)) / self.margin).clamp(0, 1))

    @functools.cached_property
    def count(self) -> Callable[[str], int]:
        """Text -> its length in characters, or in the tokens of `tokenizer`."""
        if self.tokenizer is None:
            return len
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self.tokenizer)
        return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
