"""Is the answer right? The truth is in the metadata, and math-verify compares: 0.5 is 1/2 is \\frac{1}{2}.

    1 where the text's answer equals the metadata's, 0 where it differs or where the text has none

A row whose metadata hold no answer, or one that cannot be read as mathematics, is invalid: nobody can say whether the text
is right. So is one where that takes longer than `seconds`. A text that cannot be read is wrong, since the problem could
have been answered.

math-verify reads the last expression of a text, or what is in \\boxed{} or behind words such as "the answer is", and it
calculates: to it 47+38 is as good an answer as 85. Where the truth is an integer the answer must be a number already, else
a model would learn to repeat the question.

math-verify keeps time by a signal, which only the main thread can set. There `seconds` limits each reading and each
comparison; in another thread (a reward server, rewards that overlap the next rollout) nothing here does, and a limit comes
from outside: the `timeout` that a reward is given. It ends the waiting, not the thread, which reads on until it is done.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
import threading
from collections.abc import Sequence
from typing import Any

import torch

from rewards.base import Metadata, Samples, Scores, check_texts

log = logging.getLogger(__name__)
REMEMBERED = 65536
"""Texts whose reading, and pairs whose comparison, are kept: the samples of a prompt are often the same."""


class MathAnswer:
    """1 if the text's answer equals the metadata's by math-verify, else 0; a row without an answer is invalid.

    key: where the metadata hold the answer. extract: a regular expression whose last match (its first group, if it has
    one) holds the text's answer; without it math-verify looks for the last expression. seconds: limit for reading a text,
    and for a comparison, in the main thread; elsewhere the reward's timeout is the limit.
    """

    name = "math"
    needs: tuple[str, ...] = ("texts", "metadata")

    def __init__(self, *, key: str = "answer", extract: str | None = None, seconds: int = 5) -> None:
        if seconds < 1:
            raise ValueError(f"reward 'math': seconds is {seconds}, expected a whole number of at least 1")
        self.key, self.seconds = key, seconds
        self.pattern = None if extract is None else compiled(extract, "reward 'math': extract")

    def to(self, device: torch.device | str) -> MathAnswer:
        """Nothing to move: answers are compared on the CPU."""
        return self

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score B texts; prompts are not read."""
        answers = [row.get(self.key) for row in metadata]
        truths = ["" if answer is None else str(answer) for answer in answers]
        texts = map(self.stated, check_texts(samples, self.name))
        judged = [self._judged(truth, text) for truth, text in zip(truths, texts, strict=True)]
        values = torch.tensor([value or 0.0 for value in judged])
        return Scores(values, torch.tensor([value is not None for value in judged], dtype=torch.bool))

    def _judged(self, truth: str, text: str) -> float | None:
        """1 or 0; None where there is no truth, or no time to find out."""
        try:
            return float(_equal(truth, text, self.seconds)) if _truth(truth, self.seconds) else None
        except TimeoutError as error:
            log.warning("reward 'math' could not judge a text: %s", error)
            return None

    def stated(self, text: str) -> str:
        """The part of a text in which the answer is looked for; empty where `extract` does not match."""
        return text if self.pattern is None else last_match(self.pattern, text) or ""


def compiled(pattern: str, what: str) -> re.Pattern[str]:
    """A regular expression in which . matches line breaks too, or a ValueError that names the option."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{what} is no regular expression: {error}; found {pattern!r}") from error


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match in a text, or its first group if it has one; None where there is none."""
    matches = list(pattern.finditer(text))
    return matches[-1].group(pattern.groups and 1) or "" if matches else None


def _limit(seconds: int) -> int | None:
    """The limit in the main thread, none elsewhere: math-verify raises there if it is to set a signal."""
    return seconds if threading.current_thread() is threading.main_thread() else None


@functools.lru_cache(REMEMBERED)
def _read(text: str, seconds: int) -> tuple[Any, ...]:
    """The expressions that math-verify finds in a text, the one it takes for the answer; none if there are none."""
    from math_verify import parse  # some seconds: sympy and a grammar of LaTeX
    from math_verify.errors import TimeoutException  # no Exception, so that no handler swallows it

    try:
        return tuple(parse(text, fallback_mode="no_fallback", parsing_timeout=_limit(seconds), raise_on_error=True))
    except TimeoutException:
        raise TimeoutError(f"reading {text[:80]!r} took over {seconds} s") from None
    except Exception:  # it cannot be read as mathematics
        return ()


def _truth(answer: str, seconds: int) -> tuple[Any, ...]:
    """The expressions of an answer, which may be LaTeX without its dollar signs."""
    return _read(answer, seconds) or _read(f"${answer}$", seconds)


@functools.lru_cache(REMEMBERED)
def _equal(truth: str, answer: str, seconds: int) -> bool:
    from sympy import Add, Integer, Mul, Pow

    gold, found = _truth(truth, seconds), _read(answer, seconds)
    if all(isinstance(value, Integer) for value in gold) and any(value.has(Add, Mul, Pow) for value in found):
        return False
    return any(_same(one, other, seconds) for one, other in itertools.product(gold, found))


def _same(gold: Any, found: Any, seconds: int) -> bool:
    """Whether two expressions are equal; not where sympy fails to compare them."""
    from math_verify import verify
    from math_verify.errors import TimeoutException

    try:
        return bool(verify(gold, found, timeout_seconds=_limit(seconds), raise_on_error=True))
    except TimeoutException:
        raise TimeoutError(f"a comparison took over {seconds} s") from None
    except Exception:
        return False
