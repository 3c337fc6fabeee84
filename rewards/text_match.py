"""Comparison of texts with the metadata, letter by letter or by a pattern.

    exact_match  1 if the text, or the answer found in it, is one of the metadata's answers, else 0
    regex_match  1 if the pattern in the metadata is found in the text, else 0

A row without an answer or a pattern in its metadata is invalid. Use `math` for mathematical answers, and `format` for one
pattern for all texts.

No reward here runs code that a model has written, on purpose. That needs a sandbox (another user or machine, no network,
limits of memory and time), and a library that only pretends to have one does harm. If you have a sandbox, call it from a
reward of your own, or run a reward server inside it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from rewards.base import Metadata, MetadataError, Samples, Scores, WithoutDevice, check_texts
from rewards.options import check_at_least_one, check_choice
from rewards.patterns import compile_pattern
from rewards.typography import unify_typography
from rewards.workers import call_each

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise_spaces(text: str) -> str:
    """Return the words of a text with one space between them."""
    return " ".join(text.split())


def normalise_words(text: str) -> str:
    """Return SQuAD's normal form (the evaluation of 1606.05250): lower case, no punctuation or articles, single spaces."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return normalise_spaces(_ARTICLES.sub(" ", bare))


NORMAL_FORMS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "spaces": normalise_spaces,
    "case": lambda text: normalise_spaces(text).casefold(),
    "words": normalise_words,
}


class ExactMatch(WithoutDevice):
    """1 if the text is the metadata's answer, or one of several, letter by letter; else 0.

    Composed and decomposed letters are equal, straight and typographic quotes, and all dashes. key: the metadata's key of
    the answer or of a list of answers. normalise: none; spaces (single spaces between words); case (spaces, and case is
    ignored); words (case, and punctuation and articles are ignored, as in SQuAD). extract: a regular expression whose last
    match (its first group, if it has one) is the text's answer. seconds: limit for it, in seconds of computing; a text that
    needs longer is invalid.
    """

    name = "exact_match"
    needs: tuple[str, ...] = ("texts", "metadata")

    def __init__(
        self, *, key: str = "answer", normalise: str = "none", extract: str | None = None, seconds: int = 5
    ) -> None:
        check_at_least_one(self.name, seconds=seconds)
        if extract is not None:
            compile_pattern(extract, "reward 'exact_match': extract")
        self.key, self.extract, self.seconds = key, extract, seconds
        self.normalise = NORMAL_FORMS[check_choice(self.name, "normalise", normalise, NORMAL_FORMS)]

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score B texts; prompts are not used."""
        truths = [to_answers(row.get(self.key)) for row in metadata]
        answers = self._extract_answers(check_texts(samples, self.name))
        return Scores.from_list([self._score_answer(*pair) for pair in zip(answers, truths, strict=True)])

    def _score_answer(self, answers: Sequence[str] | None, truths: Sequence[str]) -> float | None:
        """Return 1 or 0; None without a truth, and if the text could not be searched for its answer."""
        if not truths or answers is None:
            return None
        accepted = {self.normalise(unify_typography(truth)) for truth in truths}
        return float(any(self.normalise(unify_typography(answer)) in accepted for answer in answers))

    def _extract_answers(self, texts: Sequence[str]) -> Sequence[Sequence[str] | None]:
        """Return the answer of each text, or none, as a sequence; None if the search took too long."""
        if self.extract is None:
            return [[text] for text in texts]
        calls = [(self.extract, text) for text in texts]
        return call_each("rewards.patterns:last_match", calls, self.seconds, self.name)


class RegexMatch(WithoutDevice):
    """1 if the regular expression in the metadata is found in the text, else 0.

    `format` has one pattern for all texts. key: the metadata's key of the pattern. whole: whether it must match the whole
    text. A dot matches line breaks too; (?i) at the start of the pattern ignores case. seconds: limit for a text, in seconds
    of computing; a text that needs longer is invalid.
    """

    name = "regex_match"
    needs: tuple[str, ...] = ("texts", "metadata")

    def __init__(self, *, key: str = "pattern", whole: bool = False, seconds: int = 5) -> None:
        check_at_least_one(self.name, seconds=seconds)
        self.key, self.whole, self.seconds = key, whole, seconds

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score B texts; prompts appear in errors only."""
        texts = check_texts(samples, self.name)
        patterns = [self._check(row.get(self.key), i, prompts[i]) for i, row in enumerate(metadata)]
        calls = [
            (pattern, text, self.whole) for pattern, text in zip(patterns, texts, strict=True) if pattern is not None
        ]
        found = iter(call_each("rewards.patterns:matches", calls, self.seconds, self.name))
        return Scores.from_list([None if pattern is None else next(found) for pattern in patterns])

    def _check(self, pattern: object, row: int, prompt: str) -> str | None:
        """Return a pattern, or None where there is none. MetadataError if it is not a regular expression."""
        if pattern is not None and not isinstance(pattern, str):
            problem = f"metadata {self.key!r} is {pattern!r}, expected a regular expression"
            raise MetadataError(self.name, problem, row, prompt)
        try:
            return None if pattern is None else compile_pattern(pattern, f"metadata {self.key!r}").pattern
        except ValueError as error:
            raise MetadataError(self.name, str(error), row, prompt) from error


def to_answers(truth: object) -> list[str]:
    """Return the accepted answers of the metadata's value, which may be one answer, a list, or None for no answer."""
    answers = truth if isinstance(truth, list | tuple) else [truth]
    return [str(answer) for answer in answers if answer is not None]
