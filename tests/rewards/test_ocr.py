from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from rewards import RewardError, make, score
from rewards.ocr import edit_distance, normalise, quoted, similarity


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("ab", "ba", 2),
        ("same", "same", 0),
    ],
)
def test_edit_distances_by_hand(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


words = st.text(alphabet="abc", max_size=8)


@given(one=words, other=words, third=words)
def test_edit_distance_is_a_metric(one: str, other: str, third: str) -> None:
    distance = edit_distance(one, other)
    assert abs(len(one) - len(other)) <= distance <= max(len(one), len(other))
    assert (distance == 0) == (one == other)
    assert distance <= edit_distance(one, third) + edit_distance(third, other)


def test_quoted_text() -> None:
    assert quoted('a sign that says "Open 24 h" and "closed"') == "Open 24 h"
    assert quoted("a sign that says “Ouvert”") == "Ouvert"
    assert quoted("a dog's bowl") == quoted('an open " mark') == quoted('nothing: ""') == ""


def test_similarity_by_hand() -> None:
    text = normalise("HELLO 42")
    assert text == "hello42"
    assert similarity("Hello 42", text) == 1.0
    assert similarity("SHOP hello 42 open", text) == 1.0
    assert similarity("HELO 42", text) == pytest.approx(1 - 1 / 7)
    assert similarity("", text) == 0.0
    # Much unrelated text costs no more than reading nothing.
    assert similarity("x" * 50, text) == 0.0


def rendered(text: str) -> torch.Tensor:
    picture = Image.new("RGB", (256, 96), "white")
    ImageDraw.Draw(picture).text((20, 25), text, fill="black", font=ImageFont.load_default(40))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def test_reads_rendered_text() -> None:
    pytest.importorskip("rapidocr_onnxruntime", reason="rapidocr-onnxruntime needs Python below 3.13")
    reward = make("ocr", threads=1)
    blank = torch.ones(3, 96, 256)
    images = torch.stack([rendered("HELLO 42"), rendered("HELLO 42"), blank, rendered("HELLO 42")])
    prompts = ['a sign "HELLO 42"', 'a sign "HELLO 43"', 'a sign "HELLO 42"', "a sign"]
    result = score(reward, images, prompts, [{}] * 4)
    assert result.values.tolist() == pytest.approx([1.0, 1 - 1 / 7, 0.0, 0.0])
    assert result.valid.tolist() == [True, True, True, False]


def test_without_rapidocr_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(RewardError, match="pip install rapidocr-onnxruntime"):
        score(make("ocr"), torch.ones(1, 3, 32, 32), ['a sign "A"'], [{}])
