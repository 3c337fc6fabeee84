"""Correctness of mathematical answers, compared by math-verify with the metadata: 0.5 equals 1/2 equals \\frac{1}{2}.

    1 if the text's answer equals the metadata's, 0 if it differs or if the text has none

A row is invalid if its metadata have no answer, or one that cannot be parsed as mathematics: then nobody can decide
whether the text is right. It is invalid too if that takes longer than `seconds`. A text that cannot be parsed is wrong,
because the problem could have been answered.

math-verify parses the last expression of a text, or the one in \\boxed{} or after words such as "the answer is", and
simplifies it: to math-verify, 47+38 is as good an answer as 85. If the truth is an integer, the answer must be a number
without arithmetic. Otherwise a model would learn to repeat the question.

math-verify limits its time by a signal, which only the main thread can set. There, `seconds` limits each parsing and each
comparison. In other threads (a reward server, rewards that overlap the next rollout) this limit has no effect; the
reward's `timeout` is the limit. It ends the waiting, but not the thread, which continues until it is done.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rewards.base import Metadata, Samples, Scores, WithoutDevice, check_texts
from rewards.options import check_at_least_one, compile_pattern, last_match

log = logging.getLogger(__name__)
CACHED = 65536
"""Number of parsed texts, and of compared pairs, that are cached: samples of a prompt are often equal."""


class MathAnswer(WithoutDevice):
    """1 if the text's answer equals the metadata's by math-verify, else 0.

    A row without an answer in its metadata is invalid. key: the metadata's key of the answer. extract: a regular expression
    whose last match (its first group, if it has one) is the text's answer; without it, math-verify takes the last
    expression. seconds: limit for parsing a text, and for a comparison, in the main thread; in other threads the reward's
    timeout is the limit.
    """

    name = "math"
    needs: tuple[str, ...] = ("texts", "metadata")

    def __init__(self, *, key: str = "answer", extract: str | None = None, seconds: int = 5) -> None:
        check_at_least_one(self.name, seconds=seconds)
        self.key, self.seconds = key, seconds
        self.pattern = None if extract is None else compile_pattern(extract, "reward 'math': extract")

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score B texts; prompts are not used."""
        answers = [row.get(self.key) for row in metadata]
        truths = ["" if answer is None else str(answer) for answer in answers]
        texts = map(self.extract_answer, check_texts(samples, self.name))
        return Scores.from_list([self._score_text(*pair) for pair in zip(truths, texts, strict=True)])

    def _score_text(self, truth: str, text: str) -> float | None:
        """Return 1 or 0; None without a truth, or if the time limit was exceeded."""
        try:
            return float(_equal(truth, text, self.seconds)) if _parse_truth(truth, self.seconds) else None
        except TimeoutError as error:
            log.warning("reward 'math' could not score a text: %s", error)
            return None

    def extract_answer(self, text: str) -> str:
        """Return the part of a text that contains the answer; an empty string if `extract` does not match."""
        return text if self.pattern is None else last_match(self.pattern, text) or ""


def _time_limit(seconds: int) -> int | None:
    """Return the limit in the main thread, None in others: there math-verify cannot set its signal and would raise."""
    return seconds if threading.current_thread() is threading.main_thread() else None


@contextmanager
def _limited(seconds: int, action: str) -> Iterator[None]:
    """Raise TimeoutError if a block with calls of math-verify takes longer than the limit.

    At the limit math-verify raises its own exception out of a signal handler. Python drops an exception that is raised
    while a destructor runs, so the time is measured too.
    """
    from math_verify.errors import TimeoutException  # a BaseException, so that no handler of Exception catches it

    started, ended = time.monotonic(), True
    try:
        yield
    except TimeoutException:
        ended = False
    if not ended or (_time_limit(seconds) is not None and time.monotonic() - started >= seconds):
        raise TimeoutError(f"{action} took over {seconds} s")


@functools.lru_cache(CACHED)
def _parse(text: str, seconds: int) -> tuple[Any, ...]:
    """Return the expressions that math-verify finds as a text's answer; none if it finds none."""
    from math_verify import parse  # takes some seconds: sympy and a grammar of LaTeX

    try:
        with _limited(seconds, f"parsing {text[:80]!r}"):
            limit = _time_limit(seconds)
            return tuple(parse(text, fallback_mode="no_fallback", parsing_timeout=limit, raise_on_error=True))
    except TimeoutError:
        raise
    except Exception:  # it cannot be parsed as mathematics
        return ()


def _parse_truth(answer: str, seconds: int) -> tuple[Any, ...]:
    """Return the expressions of the metadata's answer, which may be LaTeX without dollar signs."""
    return _parse(answer, seconds) or _parse(f"${answer}$", seconds)


@functools.lru_cache(CACHED)
def _equal(truth: str, answer: str, seconds: int) -> bool:
    """Whether an answer is right."""
    from sympy import Add, Integer, Mul, Pow

    gold, found = _parse_truth(truth, seconds), _parse(answer, seconds)
    if all(isinstance(value, Integer) for value in gold) and any(value.has(Add, Mul, Pow) for value in found):
        return False
    return any(_same_value(one, other, seconds) for one, other in itertools.product(gold, found))


def _same_value(gold: object, found: object, seconds: int) -> bool:
    """Whether two expressions are equal. False if sympy cannot compare them."""
    from math_verify import verify

    try:
        with _limited(seconds, "a comparison"):
            return bool(verify(gold, found, timeout_seconds=_time_limit(seconds), raise_on_error=True))
    except TimeoutError:
        raise
    except Exception:
        return False
