from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from rewards import ClipColors, Detection, GenEval, RewardError, score
from rewards.colors import COLOR_NAMES
from rewards.detectors import ClassNames
from rewards.pictures import to_pictures
from tests.tiny_clip import tiny_clip

Box = tuple[float, float, float, float]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def thing(box: Box, mask: np.ndarray | None = None, label: str = "cat") -> Detection:
    return Detection(label, None, box, 1.0, mask)


def test_the_object_as_clip_sees_it() -> None:
    image = to_pictures(torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(1, 3, 10, 12))[0]
    mask = np.zeros((10, 12), dtype=bool)
    mask[2:6, 3:8] = True
    mask[2, 3] = False
    seen = ClipColors().cut_out(image, thing((3, 2, 8, 6), mask))
    assert seen.size == (5, 4)
    grey, red = (153, 153, 153), (255, 0, 0)
    assert (seen.getpixel((0, 0)), seen.getpixel((1, 0)), seen.getpixel((4, 3))) == (grey, red, red)
    whole = ClipColors(crop=False).cut_out(image, thing((3, 2, 8, 6), mask))
    assert (whole.size, whole.getpixel((0, 0)), whole.getpixel((3, 3))) == ((12, 10), grey, red)
    kept = ClipColors(background=None).cut_out(image, thing((3, 2, 8, 6), mask))
    assert (kept.size, kept.getpixel((0, 0))) == ((5, 4), red)


@pytest.mark.parametrize(
    ("box", "size"),
    [((3.4, 2.6, 8.6, 5.2), (6, 2)), ((11.8, 0.0, 12.0, 4.0), (1, 4)), ((0.2, 3.0, 0.4, 3.1), (1, 1))],
)
def test_boxes_without_masks_are_cut_to_whole_pixels_and_at_least_one(box: Box, size: tuple[int, int]) -> None:
    image = to_pictures(torch.zeros(1, 3, 10, 12))[0]
    assert ClipColors().cut_out(image, thing(box)).size == size


def test_colours_are_those_of_the_embeddings(clip: Path) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    boxes: list[Box] = [(0, 0, 32, 32), (4, 4, 20, 30), (10, 0, 32, 16), (16, 16, 32, 32)]
    objects = [(row, thing(box, label=label)) for row in (0, 1) for box in boxes for label in ("cat", "tv remote")]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip, backend="pil")
    shown, expected, margins = to_pictures(images), [], []
    for row, item in objects:
        crop = shown[row].crop(tuple(map(int, item.box)))
        likes = []
        for color in COLOR_NAMES:
            texts = [f"a photo of a {color} {item.label}", f"a photo of a {color}-colored {item.label}"]
            inputs = processor(
                text=[*texts, f"a photo of a {color} object"], images=crop, return_tensors="pt", padding=True
            )
            with torch.no_grad():
                outputs = model(**inputs)  # its embeddings are normalised
            mean = outputs.text_embeds.mean(0)
            likes.append(float(outputs.image_embeds[0] @ mean / mean.norm()))
        best, second = sorted(likes, reverse=True)[:2]
        margins.append(best - second)
        expected.append(COLOR_NAMES[likes.index(best)])
    assert min(margins) > 1e-5
    assert ClipColors(str(clip), batch_size=3)(images, objects) == expected
    assert len(set(expected)) > 1


def test_no_object_needs_no_model() -> None:
    assert ClipColors("no such folder")(torch.zeros(1, 3, 8, 8), []) == []


class Cats:
    """A detector that finds three cats without colours."""

    def to(self, device: torch.device | str) -> Cats:
        return self

    def __call__(self, images: torch.Tensor, wanted: ClassNames | None = None) -> list[list[Detection]]:
        cats = [Detection("cat", None, (0, 0, 4, 4), confidence) for confidence in (0.2, 0.95, 0.5)]
        return [[*cats, Detection("dog", None, (0, 0, 4, 4), 0.9)] for _ in images]


class Seen:
    """A classifier that returns colours by confidence, and records its inputs."""

    names = ("red", "blue")

    def __init__(self) -> None:
        self.asked: list[tuple[int, str, float]] = []

    def to(self, device: torch.device | str) -> Seen:
        return self

    def __call__(self, images: torch.Tensor, objects: list[tuple[int, Detection]]) -> list[str]:
        self.asked += [(row, item.label, item.score) for row, item in objects]
        return ["red" if item.score > 0.9 else "blue" for _, item in objects]


def test_geneval_asks_for_the_colours_that_clauses_need() -> None:
    colors = Seen()
    reward = GenEval(Cats(), colors)
    cat = {"class": "cat", "count": 1}
    rows = [
        {"include": [cat]},
        {"include": [{**cat, "color": "red"}]},
        {"include": [{**cat, "color": "blue"}]},
        {"include": [{**cat, "count": 2, "color": "red"}]},
        {"include": [cat], "exclude": [{"class": "*", "count": 1, "color": "blue"}], "tag": "counting"},
        {},
    ]
    result = score(reward, torch.zeros(6, 3, 8, 8), [""] * 6, rows)
    # The most confident cat is red; at the counting threshold of 0.9 it is the only one, and the dog is left out.
    assert result.values.tolist() == [1, 1, 0, 0, 1, 0]
    assert colors.asked == [(row, "cat", value) for row in (1, 2, 3) for value in (0.95, 0.5)] + [(4, "cat", 0.95)]


def test_a_colour_without_a_name_is_an_error() -> None:
    rows = [{"include": [{"class": "cat", "count": 1, "color": "teal"}]}]
    with pytest.raises(RewardError, match=r"'teal'.*is none of red, blue"):
        score(GenEval(Cats(), Seen()), torch.zeros(1, 3, 8, 8), [""], rows)
