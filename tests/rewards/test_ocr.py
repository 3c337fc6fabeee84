from __future__ import annotations

import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rewards import Ocr, RewardError, make, ocr, score
from rewards.ocr import edit_distance, normalise, quoted_text, similarity


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
    assert quoted_text('a sign that says "Open 24 h" and "closed"') == "Open 24 h"
    assert quoted_text("a sign that says “Ouvert”") == "Ouvert"
    assert quoted_text('a “friendly” sign that says "Open"') == "Open"  # the straight marks, as published
    assert quoted_text("a dog's bowl") == quoted_text('an open " mark') == quoted_text('nothing: ""') == ""


@pytest.mark.parametrize(
    ("read", "text"), [("cafe\u0301", "caf\u00e9"), ("\u201chi\u201d", '"hi"'), ("don\u2019t", "don't")]
)
def test_codes_of_one_character_are_equal(read: str, text: str) -> None:
    assert similarity(read, normalise(text)) == similarity(text, normalise(read)) == 1.0


def test_similarity_by_hand() -> None:
    text = normalise("HELLO 42")
    assert text == "hello42"
    assert similarity("Hello 42", text) == 1.0
    assert similarity("SHOP hello 42 open", text) == 1.0
    assert similarity("HELO 42", text) == pytest.approx(1 - 1 / 7)
    assert similarity("", text) == 0.0
    # Much unrelated text costs no more than reading nothing.
    assert similarity("x" * 50, text) == 0.0


def rendered(
    text: str, size: int = 40, angle: float = 0, closer: int = 0, colors: tuple[str, str] = ("black", "white")
) -> Tensor:
    """Return a picture [3,256,256] of centred text, rotated counter-clockwise, with its letters moved ``closer``."""
    ink, paper = colors
    font, picture = ImageFont.load_default(size), Image.new("RGB", (256, 256), paper)
    canvas = ImageDraw.Draw(picture)
    if closer:
        x = 20.0
        for letter in text:
            canvas.text((x, 100), letter, fill=ink, font=font)
            x += canvas.textlength(letter, font=font) - closer
    else:
        canvas.multiline_text((128, 128), text, fill=ink, font=font, anchor="mm", align="center")
    turned = picture.rotate(angle, resample=Image.Resampling.BICUBIC, fillcolor=paper)
    return torch.from_numpy(np.array(turned)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def reader() -> Ocr:
    pytest.importorskip("rapidocr_onnxruntime", reason="rapidocr-onnxruntime needs Python below 3.13")
    reward = make("ocr", threads=1)
    assert isinstance(reward, Ocr)
    return reward


def value(reader: Ocr, image: Tensor, text: str) -> float:
    return float(score(reader, image[None], [f'a sign that says "{text}"'], [{}]).values[0])


def test_reads_rendered_text(reader: Ocr) -> None:
    images = torch.stack([rendered("HELLO 42")] * 3)
    result = score(reader, images, ['a sign "HELLO 42"', 'a sign "HELLO 43"', "a sign"], [{}] * 3)
    assert result.values.tolist() == pytest.approx([1.0, 1 - 1 / 7, 0.0])
    assert result.valid.tolist() == [True, True, False]


@pytest.mark.parametrize("angle", [15, 60, -45, -90])
def test_reads_turned_text(reader: Ocr, angle: float) -> None:
    assert value(reader, rendered("HELLO", angle=angle), "HELLO") == 1.0


@pytest.mark.parametrize("angle", [90, 180])
def test_does_not_read_text_on_its_left_side_or_upside_down(reader: Ocr, angle: float) -> None:
    assert value(reader, rendered("HELLO", angle=angle), "HELLO") <= 0.4


@pytest.mark.parametrize("size", [10, 16, 100])
def test_reads_small_and_large_text(reader: Ocr, size: int) -> None:
    assert value(reader, rendered("STOP", size=size), "STOP") == 1.0


def test_reads_several_lines_as_one_text(reader: Ocr) -> None:
    image = rendered("HAPPY\nBIRTHDAY\nANNA")
    assert value(reader, image, "Happy Birthday Anna") == 1.0
    assert value(reader, image, "birthday") == 1.0  # other lines cost nothing
    # Not in one piece: what was read is 17 letters, of which 8 are too many for 9.
    assert value(reader, image, "Happy Anna") == pytest.approx(1 - 8 / 9)


def test_reads_letters_that_touch_and_takes_doubled_ones_for_one(reader: Ocr) -> None:
    assert value(reader, rendered("HELLO", size=60, closer=4), "HELLO") == 1.0
    assert value(reader, rendered("HELLO", size=60, closer=10), "HELLO") == pytest.approx(0.8)


@pytest.mark.parametrize("colors", [("red", "blue"), ("white", "black"), ("lightgrey", "white")])
def test_reads_every_ink(reader: Ocr, colors: tuple[str, str]) -> None:
    assert value(reader, rendered("HELLO", colors=colors), "HELLO") == 1.0


def test_a_picture_without_text_has_no_text(reader: Ocr) -> None:
    noise = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    for image in (torch.ones(3, 256, 256), torch.zeros(3, 64, 64), noise):
        assert value(reader, image, "HELLO") == 0.0


def test_other_text_scores_its_common_characters(reader: Ocr) -> None:
    assert value(reader, rendered("CLOSED"), "OPEN") <= 0.25
    assert value(reader, rendered("HELP"), "HELLO") == pytest.approx(0.6)


class FakeReader:
    """A reader that records how many threads read at the same time."""

    def __init__(self) -> None:
        self.busy, self.most = 0, 0

    def __call__(self, image: np.ndarray, use_cls: bool) -> tuple[list[Any], None]:
        self.busy += 1
        self.most = max(self.most, self.busy)
        time.sleep(0.01)
        self.busy -= 1
        return [([], "A", 0.9)], None


def test_threads_share_one_reader_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[FakeReader] = []

    def load(threads: int) -> FakeReader:
        time.sleep(0.02)
        readers.append(FakeReader())
        return readers[-1]

    monkeypatch.setattr(ocr, "_load_reader", load)
    reward, results = Ocr(), []
    image = torch.zeros(2, 3, 8, 8)

    def work() -> None:
        results.append(reward(image, ['"A"', '"B"'], [{}, {}]).values.tolist())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1.0, 0.0]] * 4
    assert [reader.most for reader in readers] == [1]


def test_the_reader_is_given_blue_first_and_no_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def read(image: np.ndarray, use_cls: bool) -> tuple[list[Any], None]:
        assert not use_cls
        seen.append(image)
        return [], None

    monkeypatch.setattr(ocr, "_load_reader", lambda threads: read)
    image = torch.tensor([1.0, 0.2, 0.0])[:, None, None].expand(3, 8, 8)
    assert Ocr()(image[None], ['"A"'], [{}]).values.tolist() == [0.0]
    assert seen[0][0, 0].tolist() == [0, 51, 255]


def test_without_rapidocr_the_error_has_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(RewardError, match="pip install rapidocr-onnxruntime"):
        score(make("ocr"), torch.ones(1, 3, 32, 32), ['a sign "A"'], [{}])
