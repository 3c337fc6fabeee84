"""Tests of regular expressions of users: what they mean, and that none can hold the program."""

from __future__ import annotations

from typing import Any

import pytest

from rewards import make, score
from rewards.patterns import compile_pattern, last_match, matches

EVIL = r"(a|a)*c"
HELD = "a" * 40 + "b"


def test_a_dot_matches_line_breaks() -> None:
    assert matches("a.b", "a\nb", whole=True)
    with pytest.raises(ValueError, match=r"reward 'far': pattern is not a regular expression: .*; found '\('"):
        compile_pattern("(", "reward 'far': pattern")


@pytest.mark.parametrize("pattern", ["(" * 50_000 + ")" * 50_000, "a{99999999999999999999}"])
def test_a_pattern_that_python_cannot_compile_is_named(pattern: str) -> None:
    with pytest.raises(ValueError, match="reward 'far': pattern is not a regular expression"):
        compile_pattern(pattern, "reward 'far': pattern")


def test_found_or_the_whole_text() -> None:
    assert [matches("b", "ab", whole) for whole in (False, True)] == [True, False]


@pytest.mark.parametrize(
    ("pattern", "text", "expected"), [("[0-9]", "1 2", ["2"]), ("a([0-9]?)", "a1 a", [""]), ("[0-9]", "a", [])]
)
def test_last_match_or_its_first_group(pattern: str, text: str, expected: list[str]) -> None:
    assert last_match(pattern, text) == expected


@pytest.mark.parametrize(
    ("name", "options", "row"),
    [
        ("format", {"pattern": EVIL}, {}),
        ("regex_match", {}, {"pattern": EVIL}),
        ("regex_match", {"whole": True}, {"pattern": EVIL}),
        ("exact_match", {"extract": EVIL}, {"answer": "a"}),
        ("math", {"extract": EVIL}, {"answer": "a"}),
    ],
)
def test_a_text_that_a_pattern_never_ends_with_is_invalid(
    name: str, options: dict[str, Any], row: dict[str, str]
) -> None:
    found = score(make(name, seconds=1, **options), ["ac", HELD, "ac"], [""] * 3, [row] * 3)
    assert found.valid.tolist() == [True, False, True]
    assert found.values.tolist() == [1, 0, 1]


@pytest.mark.parametrize("name", ["format", "regex_match", "exact_match", "math"])
def test_a_limit_below_a_second_is_refused(name: str) -> None:
    options = {"pattern": "a"} if name == "format" else {}
    with pytest.raises(ValueError, match=f"reward '{name}': seconds is 0, expected at least 1"):
        make(name, seconds=0, **options)
