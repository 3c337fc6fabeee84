"""Does the text say what the metadata expect, letter by letter or by a pattern?

    exact_match  1 where the text, or the answer found in it, is one of the metadata's answers, else 0
    regex_match  1 where the pattern in the metadata is found in the text, else 0

A row whose metadata hold nothing to compare with is invalid. For answers that are mathematics there is `math`, for a form
that all texts share `format`.

Code that a model has written is run by no reward here, on purpose: that needs a sandbox of its own (another user or
machine, no network, limits of memory and time), and a library that pretends to have one does harm. Where you have one,
call it from a reward of your own, or from a reward server that stands inside it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from rewards.base import Metadata, RewardError, Samples, Scores, check_texts
from rewards.math_answers import compiled, last_match

REMEMBERED = 65536
"""Patterns that are kept: the samples of a prompt share theirs."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def spaced(text: str) -> str:
    """Words with one space between them, and none around."""
    return " ".join(text.split())


def words_alone(text: str) -> str:
    """SQuAD's normal form (1606.05250, its evaluation): lower case, without punctuation, articles and wider spaces."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return spaced(_ARTICLES.sub(" ", bare))


NORMAL_FORMS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "spaces": spaced,
    "case": lambda text: spaced(text).casefold(),
    "words": words_alone,
}


class ExactMatch:
    """1 if the text is the metadata's answer (or one of a list), letter by letter after `normalise`, else 0.

    key: where the metadata hold the answer. normalise: none; spaces (one between words, none around); case (and without
    regard to case); words (and without punctuation and articles, as SQuAD compares). extract: a regular expression whose
    last match (its first group, if it has one) is the text's answer.
    """

    name = "exact_match"
    needs: tuple[str, ...] = ("texts", "metadata")

    def __init__(self, *, key: str = "answer", normalise: str = "none", extract: str | None = None) -> None:
        if normalise not in NORMAL_FORMS:
            raise ValueError(
                f"reward 'exact_match': normalise is {normalise!r}, expected one of {', '.join(NORMAL_FORMS)}"
            )
        self.key, self.form = key, NORMAL_FORMS[normalise]
        self.pattern = None if extract is None else compiled(extract, "reward 'exact_match': extract")

    def to(self, device: torch.device | str) -> ExactMatch:
        """Nothing to move."""
        return self

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score B texts; prompts are not read."""
        truths = [answers(row.get(self.key)) for row in metadata]
        values = [
            found is not None and self.form(found) in map(self.form, truth)
            for found, truth in zip(map(self.stated, check_texts(samples, self.name)), truths, strict=True)
        ]
        return Scores(
            torch.tensor(values, dtype=torch.float32), torch.tensor([bool(t) for t in truths], dtype=torch.bool)
        )

    def stated(self, text: str) -> str | None:
        """The part of a text that is its answer; None where `extract` does not match."""
        return text if self.pattern is None else last_match(self.pattern, text)


class RegexMatch:
    """1 if the regular expression in the metadata is found in the text, else 0; `format` has one for all texts.

    key: where the metadata hold it. whole: whether it must match the whole text. A dot matches line breaks too; (?i) at
    its start leaves case out.
    """

    name = "regex_match"
    needs: tuple[str, ...] = ("texts", "metadata")

    def __init__(self, *, key: str = "pattern", whole: bool = False) -> None:
        self.key, self.whole = key, whole

    def to(self, device: torch.device | str) -> RegexMatch:
        """Nothing to move."""
        return self

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score B texts; prompts are only named in errors."""
        texts = check_texts(samples, self.name)
        patterns = [self._pattern(row.get(self.key), i, prompts[i]) for i, row in enumerate(metadata)]
        values = [
            pattern is not None and (pattern.fullmatch(text) if self.whole else pattern.search(text)) is not None
            for pattern, text in zip(patterns, texts, strict=True)
        ]
        valid = torch.tensor([pattern is not None for pattern in patterns], dtype=torch.bool)
        return Scores(torch.tensor(values, dtype=torch.float32), valid)

    def _pattern(self, pattern: object, row: int, prompt: str) -> re.Pattern[str] | None:
        if pattern is None:
            return None
        if not isinstance(pattern, str):
            found = f"metadata {self.key!r} is {pattern!r}, expected a regular expression"
            raise RewardError(self.name, found, row, prompt)
        try:
            return _compiled(pattern, f"metadata {self.key!r}")
        except ValueError as error:
            raise RewardError(self.name, str(error), row, prompt) from error


def answers(truth: object) -> list[str]:
    """The accepted answers that metadata hold: one, or a list; none if there are none."""
    several = truth if isinstance(truth, list | tuple) else [truth]
    return [str(one) for one in several if one is not None]


_compiled = lru_cache(REMEMBERED)(compiled)
