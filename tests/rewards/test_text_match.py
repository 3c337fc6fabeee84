"""Tests of exact answers, and of patterns in the metadata, by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards import RewardError, make, score
from rewards.text_match import NORMAL_FORMS, to_answers


def values(name: str, texts: list[str], rows: list[dict[str, Any]], **options: Any) -> list[float | None]:
    found = score(make(name, **options), texts, [f"prompt {i}" for i in range(len(texts))], rows)
    pairs = zip(found.values.tolist(), found.valid.tolist(), strict=True)
    return [value if valid else None for value, valid in pairs]


def test_an_answer_letter_by_letter() -> None:
    texts = ["Paris", "Paris ", "paris", "", "42", "42.0"]
    rows = [{"answer": "Paris"}] * 3 + [{"answer": ""}] + [{"answer": 42}] * 2
    assert values("exact_match", texts, rows) == [1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("text", "truth", "scores"),
    [
        # none, spaces, case, words
        ("New York", "New York", [1, 1, 1, 1]),
        (" New\n  York ", "New York", [0, 1, 1, 1]),
        ("new YORK", "New York", [0, 0, 1, 1]),
        ("the New York.", "New York", [0, 0, 0, 1]),
        ("An apple, a pear", "apple pear", [0, 0, 0, 1]),
        ("theatre", "atre", [0, 0, 0, 0]),  # no article, only letters of one
        ("York New", "New York", [0, 0, 0, 0]),
    ],
)
def test_normal_forms(text: str, truth: str, scores: list[float]) -> None:
    assert [values("exact_match", [text], [{"answer": truth}], normalise=form)[0] for form in NORMAL_FORMS] == scores


@given(st.text(" \n\t.,-AaNnTtHhEeßİ", max_size=12))
def test_a_normal_form_is_its_own(text: str) -> None:
    assert all(form(form(text)) == form(text) for form in NORMAL_FORMS.values())


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("\u1e9b\u0323", "\u017f\u0323\u0307"),
        ("\uac00", "\u1100\u1161"),
        ("don\u2019t", "don't"),
        ("\u201cyes\u201d", '"yes"'),
        ("\u00abyes\u00bb", '"yes"'),
        ("1990\u20132000", "1990-2000"),
        ("a\u2014b", "a-b"),
        ("\u22125", "-5"),
        ("a\u00a0b", "a b"),
        ("wait\u2026", "wait..."),
        ("co\u00adoperate", "cooperate"),
    ],
)
@pytest.mark.parametrize("form", NORMAL_FORMS)
def test_one_character_has_many_codes(text: str, truth: str, form: str) -> None:
    rows = [{"answer": truth}, {"answer": text}]
    assert values("exact_match", [text, truth], rows, normalise=form) == [1, 1]


@pytest.mark.parametrize(
    ("text", "truth"), [("cafe", "caf\u00e9"), ("x\u00b2", "x2"), ("\u00bd", "1/2"), ("a", "\u00e0")]
)
def test_other_characters_are_not_equal(text: str, truth: str) -> None:
    assert values("exact_match", [text], [{"answer": truth}], normalise="words") == [0]


def test_any_of_several_answers_and_another_key() -> None:
    rows = [{"cities": ["Paris", "Lyon"]}, {"cities": ["Paris", "Lyon"]}, {"answer": "Paris"}]
    assert values("exact_match", ["Lyon", "Nice", "Paris"], rows, key="cities") == [1, 0, None]


@pytest.mark.parametrize("row", [{}, {"answer": None}, {"answer": []}, {"answer": [None]}])
def test_without_an_answer_the_row_is_invalid(row: dict[str, Any]) -> None:
    assert values("exact_match", ["", "a"], [row, {"answer": "a"}]) == [None, 1]


def test_the_answer_is_the_last_match() -> None:
    rows = [{"answer": "B"}] * 4 + [{"answer": ""}]
    texts = ["Answer: A. No, Answer: B", "Answer: B, or Answer: C", "B", "answer: B", "no answer"]
    assert values("exact_match", texts, rows, extract=r"Answer: (\w)") == [1, 0, 0, 0, 0]


def test_a_pattern_of_the_row() -> None:
    texts = ["It is 42.", "It is 43.", "It is PARIS", "two\nlines", "none"]
    patterns = [r"\b4[2]\b", r"\b4[2]\b", "(?i)paris", "two.lines", None]
    rows = [{"pattern": pattern} for pattern in patterns]
    assert values("regex_match", texts, rows) == [1, 0, 1, 1, None]
    assert values("regex_match", texts, rows, whole=True) == [0, 0, 0, 1, None]
    assert values("regex_match", ["ab"], [{"wanted": "b"}], key="wanted") == [1]


def test_a_pattern_that_is_none_is_named_with_its_row() -> None:
    rows = [{"pattern": "a"}, {"pattern": "("}]
    with pytest.raises(RewardError, match=re.escape("failed at row 1 (prompt 'prompt 1'): metadata 'pattern' is no")):
        values("regex_match", ["a", "b"], rows)
    with pytest.raises(RewardError, match="metadata 'pattern' is 7, expected a regular expression") as caught:
        values("regex_match", ["a"], [{"pattern": 7}])
    assert caught.value.row == 0


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="normalise is 'lower', expected one of none, spaces, case, words"):
        make("exact_match", normalise="lower")
    with pytest.raises(ValueError, match=r"reward 'exact_match': extract is not a regular expression: .*found '\('"):
        make("exact_match", extract="(")


@pytest.mark.parametrize("name", ["exact_match", "regex_match"])
def test_texts_are_expected(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' expects a sequence of texts, found Tensor"):
        make(name)(torch.zeros(1, 3, 2, 2), [""], [{}])


def test_answers_by_hand() -> None:
    assert to_answers(7) == ["7"]
    assert to_answers(["a", None, 1.5]) == ["a", "1.5"]
    assert to_answers(None) == []
