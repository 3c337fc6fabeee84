"""Sheets of texts in a report: reading them, showing them, and problems of damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from difrl.reporting.html.text_tables import over_training, parse_text_samples, read_text_samples, side_by_side


def sheet(texts: list[list[str]], scores: Any = None, label: str = "") -> dict[str, Any]:
    return {"prompts": ["1 < 2", "b"], "sets": [{"label": label, "texts": texts, "scores": scores}]}


def test_before_after_and_the_mean_reward_of_each_prompt() -> None:
    first, last = (
        parse_text_samples(sheet([["x", "<b>"], ["", "y"]], [[0.0, 1.0], [None, 0.0]])),
        parse_text_samples(sheet([["z"], ["w"]], [[1.0], [None]]), 9),
    )
    assert first is not None
    assert last is not None
    page = over_training([first, last])
    assert "<th>step 0</th><th>step 9</th>" in page
    assert "<b>1 &lt; 2</b>" in page
    assert "<q>&lt;b&gt;</q><small>1</small>" in page.replace("1.000", "1")
    assert "<q><i>empty</i></q></p>" in page
    assert "0.500 → <b>1.000</b><svg" in page


def test_a_single_step_has_one_column() -> None:
    only = parse_text_samples(sheet([["x"], ["y"]]), 4)
    assert only is not None
    assert over_training([only]).count("<th>") == 3


def test_every_set_has_a_column_with_at_most_four_completions() -> None:
    found = parse_text_samples(sheet([["x"] * 6, ["y"]], label="w = 2"))
    assert found is not None
    page = side_by_side(found)
    assert "<th>w = 2</th>" in page
    assert page.count("<q>x</q>") == 4
    assert "and 2 more" in page


@pytest.mark.parametrize(
    "value", [None, [], {"prompts": ["a"]}, sheet([["x"]]), sheet([["x"], ["y"]], [[1.0, 2.0], [1.0]])]
)
def test_other_json_is_no_sheet_of_texts(value: Any) -> None:
    assert parse_text_samples(value) is None


def test_a_damaged_file_is_a_problem_and_pictures_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "step-000000.json").write_text(json.dumps(sheet([["x"], ["y"]])))
    (tmp_path / "step-000001.json").write_text("{")
    (tmp_path / "step-000002.json").write_text(json.dumps({"prompts": ["a"], "columns": 1, "scores": [[1.0]]}))
    (tmp_path / "step-000002.png").write_bytes(b"")
    problems: list[str] = []
    assert [one.step for one in read_text_samples(tmp_path, problems)] == [0]
    assert problems == ["step-000001.json is not a valid sheet of texts; it is left out."]
