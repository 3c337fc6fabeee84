"""Tests of mathematical answers. A row without a usable truth is invalid; a text that cannot be parsed is wrong."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import math_verify
import pytest
import torch
from math_verify.errors import TimeoutException
from math_verify.utils import timeout

from rewards import Scores, make, score
from rewards.math_answers import _equal, _parse


def verdict(truth: object, text: str, **options: object) -> float:
    result = score(make("math", **options), [text], ["?"], [{"answer": truth}])
    assert result.valid.all()
    return result.values.item()


@pytest.mark.parametrize(
    ("truth", "text"),
    [
        ("85", "85"),
        (85, "15;8;=85"),
        ("85", "The answer is 85."),
        ("85", "\\boxed{85}"),
        ("85", "We solve for x and find $x = 85$"),
        ("-5", "so it is -5"),
        ("1234", "1,234"),
        ("1/2", "$\\frac{1}{2}$"),
        ("\\frac{1}{2}", "0.5"),
        ("$\\frac{\\sqrt{2}}{2}$", "$\\frac{1}{\\sqrt{2}}$"),
        ("x+1", "$1 + x$"),
    ],
)
def test_equal_as_mathematics(truth: object, text: str) -> None:
    assert verdict(truth, text) == 1


@pytest.mark.parametrize(
    ("truth", "text"),
    [
        ("85", "86"),
        ("85", "85;=15"),  # the last one counts
        ("85", "15;8;="),
        ("85", ""),
        ("85", "eighty-five"),
        ("85", ";;=+-"),
        ("5", "-5"),
        ("1/2", "$\\frac{1}{3}$"),
    ],
)
def test_wrong_or_unreadable_answers_are_zero(truth: object, text: str) -> None:
    assert verdict(truth, text) == 0


@pytest.mark.parametrize("text", ["47+38", "=47+38", "170/2", "$x = 47 + 38$", "\\boxed{5 \\cdot 17}"])
def test_an_unfinished_calculation_is_no_answer_if_the_truth_is_an_integer(text: str) -> None:
    from math_verify import parse, verify

    assert verify(parse("85"), parse(text)), "math-verify itself takes it for the answer"
    assert verdict("85", text) == 0


@pytest.mark.parametrize("row", [{}, {"solution": "85"}, {"answer": ""}, {"answer": None}, {"answer": "?"}])
def test_without_a_truth_the_row_is_invalid(row: dict[str, object]) -> None:
    found = score(make("math"), ["85", "85"], ["?", "?"], [row, {"answer": "85"}])
    assert found.valid.tolist() == [False, True]
    assert found.values.tolist() == [0, 1]


def test_key_and_extract() -> None:
    reward = make("math", key="solution", extract=r"####\s*(-?\d+)")
    texts = ["1 #### 4 and #### 85", "85", "#### x"]
    found = score(reward, texts, [""] * 3, [{"solution": "85"}] * 3)
    assert found.values.tolist() == [1, 0, 0]
    assert verdict("85", "a85b", extract=r"\d+") == 1  # without a group the match itself


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"reward 'math': extract is not a regular expression: .*found '\('"):
        make("math", extract="(")
    with pytest.raises(ValueError, match="seconds is 0"):
        make("math", seconds=0)


SEVERAL = [
    ("85", "85"),
    ("85", "86"),
    ("1/2", "$\\frac{1}{2}$"),
    ("$\\frac{\\sqrt{2}}{2}$", "$\\frac{1}{\\sqrt{2}}$"),
    ("x+1", "$1 + x$"),
    ("(1,2]", "$[1,2]$"),
    ("\\{1,2,3\\}", "$\\{3,2,1\\}$"),
    ("$x \\le 3$", "$3 \\ge x$"),
    ("?", "85"),
]


def test_outside_the_main_thread_as_within() -> None:
    """math-verify's own time limit is a signal, which would raise an error in a thread."""
    from math_verify import parse

    def scores() -> Scores:
        truths, texts = zip(*SEVERAL, strict=True)
        return score(make("math"), texts, [""] * len(SEVERAL), [{"answer": truth} for truth in truths])

    within = scores()
    assert within.values.tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 0]
    assert within.valid.tolist() == [True] * 8 + [False]
    _parse.cache_clear()
    _equal.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        with pytest.raises(ValueError, match="doesn't support threaded environment"):
            pool.submit(parse, "85").result()
        outside = [future.result() for future in [pool.submit(scores) for _ in range(4)]]
    assert all(torch.equal(found.values, within.values) and torch.equal(found.valid, within.valid) for found in outside)


def test_hundreds_of_rows_take_a_moment() -> None:
    reward = make("math")
    texts = [f"{i % 19};{i % 20};={i}" for i in range(512)]
    reward(texts[:1], [""], [{"answer": "0"}])
    started = time.process_time()
    found = reward(texts, [""] * 512, [{"answer": str(i)} for i in range(512)])
    assert found.values.sum() == 512
    assert time.process_time() - started < 3  # 0.6 ms a row alone; slow machines and first reads allowed for


def test_images_are_refused() -> None:
    with pytest.raises(Exception, match="'math' expects a sequence of texts, found Tensor"):
        score(make("math"), torch.zeros(1, 3, 4, 4), [""], [{"answer": "1"}])


@pytest.mark.parametrize("function", ["parse", "verify"])
def test_texts_that_take_too_long_are_invalid_and_tried_again(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a text may be right, and the machine may be less busy the next time."""
    own = getattr(math_verify, function)
    _parse.cache_clear()
    _equal.cache_clear()

    def late(*arguments: Any, **options: Any) -> Any:
        if "31415" in str(arguments[-1]):
            raise TimeoutException("Operation timed out!")
        return own(*arguments, **options)

    reward, texts, metadata = make("math"), ["31415", "27182"], [{"answer": "31415"}, {"answer": "27182"}]
    with monkeypatch.context() as patched:
        patched.setattr(math_verify, function, late)
        found = score(reward, texts, ["", ""], metadata)
        assert found.valid.tolist() == [False, True]
    assert score(reward, texts, ["", ""], metadata).values.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("text", ["$9^{9^{9^{9}}}$", r"$\int_0^1 \sin(x^x)e^{x^x}dx$"])
def test_a_text_whose_parsing_or_comparison_never_ends_is_invalid_after_the_limit(text: str) -> None:
    make("math")(["1"], [""], [{"answer": "1"}])  # what is imported is not timed
    started = time.monotonic()
    found = score(make("math", seconds=1), [text], [""], [{"answer": "0.5"}])
    assert not found.valid.any()
    assert time.monotonic() - started < 60


def test_a_time_limit_whose_exception_is_lost_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python drops an exception that a signal raises while a destructor runs."""
    dropped = list[object]()
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(unraisable.exc_type))

    class Slow:
        def __del__(self) -> None:
            time.sleep(1.5)

    def verify(*_: object, timeout_seconds: int, **__: object) -> bool:
        @timeout(timeout_seconds)
        def drop() -> bool:
            held = [Slow()]
            held.clear()
            return True

        return bool(drop())

    monkeypatch.setattr(math_verify, "verify", verify)
    found = score(make("math", seconds=1), ["12345"], [""], [{"answer": "54321"}])
    assert dropped == [TimeoutException]
    assert not found.valid.any()
