"""Tests of mathematical answers. A row without a truth is invalid; a text whose answer cannot be read is wrong.

`answers.txt` has far more truths, which tests/reliability/test_answers.py tries.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import Failsafe, Scores, make, score
from rewards.answer_forms import read
from rewards.equivalence import equal, judge
from rewards.server import create_app


def verdict(truth: object, text: str, **options: object) -> float:
    result = score(make("math", **options), [text], ["?"], [{"answer": truth}])
    assert result.valid.all()
    return result.values.item()


# In all of these the place of the answer matters: a mark, the last one, the end of the text.
RIGHT = [
    ("840", r"\boxed{84}, wrong, so \boxed{840}"),
    ("5", r"\boxed{5}. The final answer is above."),
    ("5", "The answer is: 5"),
    ("5", "Answer: 5."),
    ("5", "**Answer:** 5"),
    ("5", "The final answer is **5**."),
    ("5", r"The answer is $\boxed{5}$."),
    ("5", r"\[\boxed{5}\]"),
    ("5", r"So \(x = 5\)."),
    ("5", "so x = 5 apples."),
    ("5", r"\fbox{5}"),
    ("5", r"\boxed 5"),
    ("5", r"\boxed{ 5 }"),
    ("42", r"$\boxed 42$"),
    ("2,3", r"x = \boxed{2} or x = \boxed{3}"),
    ("2,3", r"\boxed{2}, \boxed{3}"),
    ("3", "\\boxed{2}\n\\boxed{3}"),
    ("5", r"\boxed{5} and \boxed{5}"),
    (r"\frac{1}{2}", r"<answer>\frac{1}{2}</answer>"),
    ("5", "<answer>The answer is 5.</answer>"),
    ("5", "<answer>$5$</answer>"),
    ("5", r"<answer>\boxed{5}</answer>"),
    ("1,234", "...\n#### 1,234"),
    ("18", "He makes $18 a day.\n#### 18"),
    ("18", "#### $18"),
    ("B", "The correct answer is (B)."),
    ("B", "The answer is B"),
    ("B", "Answer: B"),
    ("B", "(B)"),
    ("B", "B."),
    ("B", r"The answer is \textbf{(B)}"),
    ("B", "**B**"),
    ("B", "B) 12"),
    ("B", "I choose option B."),
    ("yes", "The answer is yes."),
    ("yes", "Answer: Yes"),
    ("Paris", "The capital of France is Paris."),
    ("Paris", "Paris"),
    ("85", "85"),
    ("85", "= 85"),
    ("85", "47+38=85"),
    ("85", "The result is 47+38 = 85."),
    ("18.5", "The total is $18.50 for all."),
    ("20", "They pay $18 and $20"),
    ("18", "It costs $18."),
    ("-5", "so it is -5"),
    ("0.5", "0.5."),
    (r"2\sqrt{3}", r"The answer is 2\sqrt{3}."),
    (r"2\sqrt{3}", r"$2\sqrt{3}$"),
    (r"2\sqrt{3}", r"2\sqrt{3}"),
    (r"(-\infty, 3]", r"(-\infty, 3]"),
    ("1,-2", "The solutions are 1 and -2."),
    ("1,-2", "x = 1 or x = -2"),
    ("1,-2", "$x=1$ or $x=-2$"),
    ("85", "In 2019, 85 people came."),
    ("7", "There are 3 and 4, so 7 in total."),
    ("85", r"\boxed{\boxed{85}}"),
    ("85", r"\boxed{{85}}"),
    ("[1,2)", r"\boxed{[1,2)}"),
    ("(1,2]", r"\boxed{(1,2]} is it"),
    (r"\{1,2\}", r"\boxed{\{1,2\}}"),
    (r"\frac{3}{4}", r"Thus $\frac{3}{4}$ of it."),
    ("3/4", "so 3/4 of the cake"),
    ("12", "The sum is 12, as desired."),
    ("12", "Final answer: $12$"),
    ("12", "Final Answer: The final answer is $12$. I hope it is correct."),
    ("0", "0"),
    ("0", "-0"),
    ("1e3", "1000"),
    ("1000", "1000.0"),
    ("25", "25%"),
    ("0.25", "25%"),
    ("25%", "0.25"),
    ("5", r"\boxed{5\,}"),
    ("5", r"\boxed{5\%}"),
    (r"\sqrt{2}", "√2"),
    ("x^2", "x²"),
    ("10", "\\boxed{10}\n\nNote: there were 12 eggs."),
    ("10", "Therefore the answer is 10\n\nNote: there were 12 eggs."),
]
WRONG = [
    ("84", r"\boxed{84}, wrong, so \boxed{840}"),
    ("3", r"\boxed{2} or \boxed{3}"),
    ("5", "<answer>5"),
    ("5", "<answer></answer>5"),
    ("B", "Option B is correct? No, so the answer is (C)"),
    ("yes", "Yes, it is."),
    ("yes", "The answer is no."),
    ("Paris", "It is not Rome."),
    ("Paris", "It is Rome, not Paris."),
    ("85", "47+38"),
    ("5", "so it is -5"),
    ("2", r"2\sqrt{3}"),
    ("3", r"2\sqrt{3}"),
    ("3", r"(-\infty, 3]"),
    ("85", r"\boxed{"),
    ("85", ""),
    ("85", "   "),
    ("85", r"\boxed{}"),
    ("85", r"\boxed{84} \boxed{}"),
    ("85", r"\boxed{85"),
    ("84", r"\boxed{84} and then \boxed{85"),
    ("85", r"\boxed{85}\boxed"),
    ("5", r"\boxed{x \text{ is } 5}"),
    ("5", r"\boxed{\text{not } 5}"),
    ("5", r"\boxed{5 \text{ or } 6}"),
    ("5", r"\boxed{5, 6}"),
    ("5", r"\boxed{4\text{ or }5}"),
    ("3", "so 3/4 of the cake"),
    ("4", "so 3/4 of the cake"),
    ("7", "seven"),
    ("5", "5 + 0i"),
]


@pytest.mark.parametrize(("truth", "text"), RIGHT)
def test_the_final_answer_is_found(truth: str, text: str) -> None:
    assert judge([truth], text, None) == 1


@pytest.mark.parametrize(("truth", "text"), WRONG)
def test_what_is_not_the_final_answer_does_not_count(truth: str, text: str) -> None:
    assert judge([truth], text, None) == 0


@given(st.fractions(max_denominator=1000), st.fractions(max_denominator=1000))
def test_numbers_are_equal_in_every_notation_and_only_then(one: Fraction, other: Fraction) -> None:
    for value, notation in itertools.product((one, other), (write_slash, write_latex, write_mixed)):
        assert judge([write_latex(one)], rf"\boxed{{{notation(value)}}}", None) == (value == one)


def write_slash(value: Fraction) -> str:
    return f"{value.numerator}/{value.denominator}" if value.denominator > 1 else f"{value.numerator:,}"


def write_latex(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    above, below = abs(value.numerator), value.denominator
    return rf"{sign}\dfrac{{{above}}}{{{below}}}" if below > 1 else f"{sign}{above}"


def write_mixed(value: Fraction) -> str:
    whole, rest = divmod(abs(value.numerator), value.denominator)
    if whole == 0 or rest == 0:
        return write_slash(value).replace("-", "−")
    return rf"{'−' if value < 0 else ''}{whole}\frac{{{rest}}}{{{value.denominator}}}"


@given(st.decimals(-(10**6), 10**6, places=3))
def test_decimals_are_exact(value: object) -> None:
    fraction = Fraction(str(value))
    assert judge([str(value)], rf"\boxed{{{fraction}}}", None) == 1 or fraction.denominator == 1
    assert judge([str(value)], rf"\boxed{{{fraction + Fraction(1, 1000)}}}", None) == 0


POLYNOMIALS = st.lists(st.integers(-9, 9), min_size=2, max_size=4)


@settings(max_examples=15)
@given(POLYNOMIALS, POLYNOMIALS)
def test_polynomials_as_math_verify_compares_them(one: list[int], other: list[int]) -> None:
    """math-verify is an independent implementation. A bare number is left out: there the answer must be evaluated."""
    from math_verify import parse, verify

    truth, answer = (" + ".join(f"({c})x^{{{k}}}" for k, c in enumerate(each)) for each in (one, other))
    found = equal(read("x + " + truth), read("x + " + answer))
    assert found == verify(parse(f"$x + {truth}$"), parse(f"$x + {answer}$"), timeout_seconds=None)


@given(st.text("0123456789;=+-()\\{}[]$,.% abxfrcsqtoed^_&", max_size=40))
def test_any_text_is_judged(text: str) -> None:
    """No text raises an error, and a text in a box equals itself unless it has no answer."""
    assert judge(["5"], text, None) in (0, 1)
    assert judge([text], "5", None) in (None, 0, 1)


@pytest.mark.parametrize("text", ["47+38", "=47+38", "170/2", "$x = 47 + 38$", "\\boxed{5 \\cdot 17}"])
def test_an_unfinished_calculation_is_no_answer_if_the_truth_is_an_integer(text: str) -> None:
    assert verdict("85", text) == 0


@pytest.mark.parametrize(
    "row", [{}, {"solution": "85"}, {"answer": ""}, {"answer": None}, {"answer": "?"}, {"answer": "$$"}, {"answer": []}]
)
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


def test_any_of_several_truths() -> None:
    truth = ["\\frac{1}{2}", "half"]
    assert [verdict(truth, text) for text in (r"\boxed{0.5}", "Half", r"\boxed{2}")] == [1, 1, 0]


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
    def scores() -> Scores:
        truths, texts = zip(*SEVERAL, strict=True)
        return score(make("math"), texts, [""] * len(SEVERAL), [{"answer": truth} for truth in truths])

    within = scores()
    assert within.values.tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 0]
    assert within.valid.tolist() == [True] * 8 + [False]
    with ThreadPoolExecutor(2) as pool:
        outside = [future.result() for future in [pool.submit(scores) for _ in range(2)]]
    assert all(torch.equal(found.values, within.values) and torch.equal(found.valid, within.valid) for found in outside)


NEVER_ENDS = (r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\prod_{k=1}^{10^{9}} k}")


@pytest.mark.parametrize("text", NEVER_ENDS)
def test_only_the_text_that_never_ends_is_invalid(text: str) -> None:
    texts = [r"\boxed{\sqrt{8}}", text, "2", r"\boxed{2\sqrt{2}}"]
    found = score(make("math", seconds=1), texts, [""] * 4, [{"answer": r"2\sqrt{2}"}] * 4)
    assert found.valid.tolist() == [True, False, True, True]
    assert found.values.tolist() == [1, 0, 0, 1]


def test_a_timeout_of_the_call_leaves_time_for_the_other_texts() -> None:
    reward = Failsafe(make("math"), "drop", timeout=20)
    texts = [r"\boxed{2}", NEVER_ENDS[0], r"\boxed{2\sqrt{2}}"]
    metadata = [{"answer": r"2\sqrt{2}"}] * 3
    score(reward, texts[:1], [""], metadata[:1])
    found = score(Failsafe(reward.reward, "drop", timeout=4), texts, [""] * 3, metadata)
    assert found.valid.tolist() == [True, False, True]
    assert found.values.tolist() == [0, 0, 1]


def test_a_server_answers_a_request_with_a_text_that_never_ends() -> None:
    """Two requests at the same time: their other texts keep their scores, and the next request is answered."""
    app = create_app({"math": make("math", seconds=1)}, version="0")

    async def send(client: httpx.AsyncClient, *texts: str) -> object:
        body = {"prompts": [""] * len(texts), "texts": texts, "metadata": [{"answer": "$\\sqrt{2}$"}] * len(texts)}
        response = await client.post("/score/math", files=[("request", (None, json.dumps(body).encode()))])
        return response.json()["values"]

    async def run() -> list[object]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=300) as client:
            both = await asyncio.gather(*(send(client, r"\sqrt{2}", text, "2") for text in NEVER_ENDS))
            return [*both, await send(client, r"$\sqrt2$")]

    assert asyncio.run(run()) == [[1, None, 0], [1, None, 0], [1]]


REPETITIONS = [
    "(",
    "{",
    r"\boxed{",
    "9",
    "1+",
    "1,",
    "= ",
    "####",
    "<answer>",
    r"\frac",
    "the answer is ",
    "1 or ",
    "$",
    "\\",
]


@pytest.mark.parametrize("text", REPETITIONS)
def test_a_repetition_is_wrong_and_not_invalid(text: str) -> None:
    """A model that repeats itself must lose by it. Invalid rows would not be learnt from."""
    started = time.process_time()
    assert judge(["5"], text * 20_000, None) == 0
    assert judge([r"\frac{1}{2}x"], text * 200, None) == 0
    assert time.process_time() - started < 60


def test_no_text_runs_code(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for text in (f"__import__('os').mkdir('{path}')", rf"\variable{{__import__('os').mkdir('{path}')}}"):
        assert judge(["x"], rf"\boxed{{{text}}}", None) == 0
    assert not path.exists()
