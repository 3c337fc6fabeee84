"""Every reward of images scores pictures of one pixel, of one row or column, and of sides smaller than its kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import Aesthetic, GenEval, ImageReward, PickScore, Reward, TransformersDetector, make, score
from rewards.ocr import limit_aspect
from rewards.pictures import crop_middle
from tests.rewards import tiny_detectors
from tests.rewards.test_aesthetic import FILE, published_layers
from tests.rewards.test_image_reward import WORDS, published
from tests.tiny_clip import ARCHITECTURE, tiny_clip, tiny_open_clip

SIZES = [(1, 1), (1, 1000), (1000, 1), (3, 5), (2, 2)]
DETECTORS = ["mask2former", "detr", "rt_detr", "owlv2", "grounding_dino"]


def clip_score(folder: Path) -> Reward:
    return make("clip_score", model=str(tiny_clip(folder)))


def open_clip_score(folder: Path) -> Reward:
    return make("clip_score", model=ARCHITECTURE, backend="open_clip", pretrained=str(tiny_open_clip(folder)))


def pickscore(folder: Path) -> Reward:
    return PickScore(str(tiny_clip(folder)), str(folder))


def hpsv2(folder: Path) -> Reward:
    return make("hpsv2", weights=str(tiny_open_clip(folder)), architecture=ARCHITECTURE)


def aesthetic(folder: Path) -> Reward:
    torch.save(published_layers(), folder / FILE)
    return Aesthetic(str(tiny_clip(folder, width=768)), str(folder))


def image_reward(folder: Path) -> Reward:
    torch.save(published(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return ImageReward(weights=str(folder), tokenizer=str(folder))


def shapes(folder: Path) -> Reward:
    return make("geneval")


def judge(folder: Path) -> Reward:
    return make("judge", path="difrl/assets/judge")


def jpeg(folder: Path) -> Reward:
    return make("jpeg_compressibility")


REWARDS = [clip_score, open_clip_score, pickscore, hpsv2, aesthetic, image_reward, shapes, judge, jpeg]


def check(reward: Reward, metadata: dict[str, object], prompt: str = "a red circle") -> None:
    for height, width in SIZES:
        images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        found = score(reward, images, [prompt] * 2, [metadata] * 2)
        assert found.valid.all(), (height, width)


@pytest.mark.parametrize("build", REWARDS, ids=lambda build: build.__name__)
def test_rewards(build: Callable[[Path], Reward], tmp_path: Path) -> None:
    check(build(tmp_path), {"include": [{"class": "circle", "count": 1}]})


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name: str, tmp_path: Path) -> None:
    folder: Path = getattr(tiny_detectors, name)(tmp_path)
    check(GenEval(TransformersDetector(str(folder))), {"include": [{"class": "cat", "count": 1}]})


def test_a_line_of_pixels_is_padded_before_it_is_read() -> None:
    """RapidOCR would enlarge a row of 1,000 pixels to 225 million."""
    row = np.arange(1000, dtype=np.uint8)[None, :, None].repeat(3, 2)
    padded = limit_aspect(row)
    assert padded.shape == (63, 1000, 3)
    assert (padded == row).all()
    assert limit_aspect(row.transpose(1, 0, 2)).shape == (1000, 63, 3)
    assert limit_aspect(row[:, :16]).shape == (1, 16, 3)


def test_the_middle_of_a_long_picture_is_scored_as_before() -> None:
    """Pixels further from the middle than 64 times the shorter side have no effect on the middle square."""
    pixels = np.zeros((2, 401, 3), dtype=np.uint8)
    pixels[:, 200] = 255
    cropped = np.asarray(crop_middle(Image.fromarray(pixels)))
    assert cropped.shape == (2, 257, 3)
    assert (cropped[:, 128] == 255).all()
    assert crop_middle(whole := Image.new("RGB", (32, 2))) is whole


@pytest.mark.slow
def test_ocr() -> None:
    for height, width in SIZES:
        found = score(make("ocr"), torch.rand(1, 3, height, width), ['a sign with "A"'], [{}])
        assert found.valid.all()
