"""The problems of the arithmetic task, by hand and all of them."""

from __future__ import annotations

import pytest

from difrl.tasks import arithmetic
from difrl.tasks.arithmetic import Problem, list_problems
from rewards import make, score


@pytest.mark.parametrize(
    ("problem", "text", "answer", "careless", "worked"),
    [
        (Problem(47, "+", 38), "47+38=", 85, 75, "15;8;=85"),
        (Problem(67, "+", 58), "67+58=", 125, 115, "15;12;=125"),
        (Problem(20, "+", 3), "20+3=", 23, 23, "3;2;=23"),
        (Problem(52, "-", 37), "52-37=", 15, 25, "5;1;=15"),
        (Problem(58, "-", 37), "58-37=", 21, 21, "1;2;=21"),
        (Problem(42, "-", 37), "42-37=", 5, 15, "5;0;=5"),
        (Problem(0, "-", 0), "0-0=", 0, 0, "0;0;=0"),
    ],
)
def test_by_hand(problem: Problem, text: str, answer: int, careless: int, worked: str) -> None:
    assert (problem.text, problem.answer, problem.careless, problem.worked) == (text, answer, careless, worked)
    assert problem.metadata["answer"] == str(answer)


def test_every_problem_once_and_none_negative() -> None:
    everything = list_problems()
    assert len({p.text for p in everything}) == len(everything) == 10_000 + 5_050
    assert all(p.answer == eval(p.text.removesuffix("=")) >= 0 for p in everything)
    assert max(len(p.worked) for p in everything) == arithmetic.LONGEST
    assert set("".join(p.text + p.worked for p in everything)) == set(arithmetic.CHARACTERS)


def test_workings_add_up() -> None:
    """The number of columns times their weight is the answer: units + 10 · tens, a carried ten counted once."""
    for p in list_problems():
        units, tens, answer = p.worked.replace("=", "").split(";")
        assert int(units) % 10 + 10 * int(tens) == int(answer) == p.answer


def test_carelessness_is_ten_off_where_something_is_carried_or_borrowed() -> None:
    for p in list_problems():
        carries = p.a % 10 + p.b % 10 > 9 if p.sign == "+" else p.a % 10 < p.b % 10
        assert abs(p.answer - p.careless) == 10 * carries


def test_sides_of_the_split_never_meet() -> None:
    train, held_out = list_problems("train"), list_problems("eval")
    assert sorted(p.text for p in [*train, *held_out]) == sorted(p.text for p in list_problems())
    seen = {(p.sign, *(sorted((p.a, p.b)) if p.sign == "+" else (p.a, p.b))) for p in train}
    asked = {(p.sign, *(sorted((p.a, p.b)) if p.sign == "+" else (p.a, p.b))) for p in held_out}
    assert not seen & asked
    # Fixed for good: published figures are about these problems.
    assert len(held_out) == 1451
    assert [p.text for p in held_out[:5]] == ["0+3=", "0+9=", "0+36=", "0+42=", "0+46="]
    with pytest.raises(ValueError, match="unknown split 'test'"):
        list_problems("test")  # type: ignore[arg-type]


def test_both_solutions_are_right_and_slips_are_not() -> None:
    chosen = list_problems("eval")[::29]
    reward, rows = make("math"), [p.metadata for p in chosen]
    for texts, expected in (
        ([str(p.answer) for p in chosen], 1),
        ([p.worked for p in chosen], 1),
        ([f"{p.worked[:-1]}{(p.answer + 1) % 10}" for p in chosen], 0),
        ([p.worked.rpartition("=")[0] + "=" + p.text.removesuffix("=") for p in chosen], 0),  # repeats the question
    ):
        found = score(reward, texts, [p.text for p in chosen], rows)
        assert found.valid.all()
        assert found.values.tolist() == [expected] * len(chosen)
