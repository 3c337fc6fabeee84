"""Sheets of completions on a terminal of 80 columns, in a text file and as JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.reporting.sample_sheets import PictureSheet, build_sheet
from difrl.reporting.text_sheet import TextSheet, visible

SHEET = TextSheet(
    ["1+1=", "2+2="],
    {"w = 0": [["2", ""], ["5", "4"]], "w = 1": [["2", "2"], ["4", "22"]]},
    {"w = 1": [[1.0, None], [1.0, 0.0]]},
)
EXPECTED = """\
1+1=
  w = 0         2
                (empty)
  w = 1  1.000  2
                2

2+2="""


def printed(sheet: TextSheet, width: int = 80) -> str:
    page = io.StringIO()
    Console(file=page, width=width).print(sheet)
    return page.getvalue()


def test_a_completion_has_a_line_with_its_reward() -> None:
    assert SHEET.as_text().startswith(EXPECTED)
    assert SHEET.as_text().splitlines()[-1] == "         0.000  22"


def test_long_completions_are_folded_within_the_width() -> None:
    sheet = TextSheet(["sum " * 40], {"": [["7" * 300]]}, {"": [[0.5]]})
    lines = printed(sheet).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("7") for line in lines) == 300


def test_control_characters_are_not_printed() -> None:
    assert visible("a\x1b[31mb\r\nc\td") == "a\N{REPLACEMENT CHARACTER}[31mb\N{REPLACEMENT CHARACTER}\nc\td"
    sheet = TextSheet(["\x1b[2J"], {"": [["[bold]x[/bold]\x07"]]}, {})
    assert "\x1b" not in printed(sheet)
    assert "[bold]x[/bold]" in printed(sheet)


@pytest.mark.parametrize(("name", "written"), [("a", "a.txt"), ("a.txt", "a.txt"), ("a.json", "a.json")])
def test_the_suffix_decides_the_format(tmp_path: Path, name: str, written: str) -> None:
    assert SHEET.save(tmp_path / name) == tmp_path / written
    text = (tmp_path / written).read_text(encoding="utf-8")
    if written.endswith("json"):
        found = json.loads(text)
        assert found["prompts"] == ["1+1=", "2+2="]
        assert found["sets"][0] == {"label": "w = 0", "texts": [["2", ""], ["5", "4"]], "scores": None}
        assert found["sets"][1]["scores"] == [[1.0, None], [1.0, 0.0]]
    else:
        assert text == SHEET.as_text()


def test_texts_make_a_table_and_images_a_picture(tmp_path: Path) -> None:
    prompts, numbers = (Prompt("a", {}), Prompt("a", {}), Prompt("b", {}), Prompt("b", {})), torch.arange(4)
    texts = Rollout(prompts, numbers, numbers, {}, texts=("1", "2", "3", "4"))
    sheet = build_sheet(["a", "b"], {"": texts}, {})
    assert isinstance(sheet, TextSheet)
    assert sheet.sets == {"": [("1", "2"), ("3", "4")]}
    images = Rollout(prompts, numbers, numbers, {}, images=torch.rand(4, 3, 8, 8))
    sheet = build_sheet(["a", "b"], {"": images}, {"": [[1.0, 0.0], [0.5, None]]})
    assert isinstance(sheet, PictureSheet)
    assert sheet.save(tmp_path / "sheet") == tmp_path / "sheet.png"
    assert sheet.as_data()["scores"] == [[1.0, 0.0], [0.5, None]]


def test_a_sheet_of_edits_shows_the_input_of_each_prompt_once(tmp_path: Path) -> None:
    """Two prompts with two samples each, and input images of a colour of their own."""
    colours = {"a": (250, 10, 20), "b": (10, 20, 250)}
    for name, colour in colours.items():
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    prompts = tuple(Prompt(name, {}, image=tmp_path / f"{name}.png") for name in "aabb")
    rollout = Rollout(prompts, torch.arange(4), torch.arange(4), {}, images=torch.zeros(4, 3, 16, 16))
    sheet = np.asarray(Image.open(build_sheet(["a", "b"], {"": rollout}, {}).save(tmp_path / "sheet.png")))
    assert [int((sheet == colour).all(-1).sum()) for colour in colours.values()] == [128 * 128] * 2
