"""Correctness of answers to problems of mathematics, compared with the metadata's: 0.5 equals 1/2 equals \\frac{1}{2}.

    1 if the text's final answer equals the metadata's, 0 if it differs or if the text has none

The metadata's answer may be a number, LaTeX with or without dollars, words, a letter of multiple choice, or a whole solution
that ends in \\boxed{…} or "#### 42". `rewards.final_answer` finds the answer of a text, and `rewards.equivalence` compares.

A row is invalid if its metadata have no answer, or if the text cannot be judged within `seconds`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rewards.base import Metadata, Samples, Scores, WithoutDevice, check_texts
from rewards.options import check_at_least_one
from rewards.patterns import compile_pattern
from rewards.text_match import to_answers
from rewards.workers import call_each, start

JUDGE = "rewards.equivalence:judge"


class MathAnswer(WithoutDevice):
    """1 if the text's final answer equals the metadata's, as mathematics or as words, else 0.

    A row without an answer in its metadata is invalid. key: the metadata's key of the answer, or of a list of accepted
    answers. extract: a regular expression whose last match (its first group, if it has one) has the text's answer; without
    it that is the last one in \\boxed{}, in <answer></answer>, behind #### or "the answer is", or else the last
    mathematics. seconds: limit for a text, in seconds of computing; a text that needs longer is invalid.
    """

    name = "math"
    needs: tuple[str, ...] = ("texts", "metadata")

    def __init__(self, *, key: str = "answer", extract: str | None = None, seconds: int = 5) -> None:
        check_at_least_one(self.name, seconds=seconds)
        if extract is not None:
            compile_pattern(extract, "reward 'math': extract")
        self.key, self.extract, self.seconds = key, extract, seconds

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score B texts; prompts are not used."""
        truths = [tuple(to_answers(row.get(self.key))) for row in metadata]
        pairs = zip(truths, check_texts(samples, self.name), strict=True)
        calls = [(truth, text, self.extract) for truth, text in pairs]
        return Scores.from_list(call_each(JUDGE, calls, self.seconds, self.name))

    def preload(self) -> None:
        """Start the process that judges: it imports algebra, which takes a second."""
        start(JUDGE)
