"""Tests of HPSv2.1 against open_clip and torchvision, with a checkpoint in the published format."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from rewards import HPSv2, RewardError, make, score
from rewards.hpsv2 import letterbox
from rewards.pictures import to_pictures
from tests.tiny_clip import ARCHITECTURE, SIZE, random_images, tiny_open_clip

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a red cat", "a blue dog", "a cat and " * 50]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_open_clip(tmp_path_factory.mktemp("hpsv2"))


def published(image: Tensor, antialias: bool) -> Tensor:
    """Return a picture [3,H,W] preprocessed by torchvision, in the steps of the published transform."""
    tensor = vision.to_tensor(to_pictures(image[None])[0])
    scale = SIZE / max(tensor.shape[1:])
    height, width = round(tensor.shape[1] * scale), round(tensor.shape[2] * scale)
    tensor = vision.resize(tensor, [height, width], InterpolationMode.BICUBIC, antialias=antialias)
    down, right = SIZE - height, SIZE - width
    tensor = vision.pad(tensor, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)
    return vision.normalize(tensor, list(MEAN), list(STD))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("shape", [(40, 56), (64, 64), (57, 33), (20, 32), (8, 10)])
def test_equals_open_clip_under_the_published_preprocessing(
    checkpoint: Path, shape: tuple[int, int], antialias: bool
) -> None:
    import open_clip

    images = random_images(3, *shape)
    pixels = torch.stack([published(image, antialias) for image in images])
    model = open_clip.create_model(ARCHITECTURE, pretrained=str(checkpoint), output_dict=True).eval()
    with torch.no_grad():
        output = model(pixels, open_clip.get_tokenizer(ARCHITECTURE)(PROMPTS))
    expected = (output["image_features"] @ output["text_features"].T).diagonal()
    reward = make("hpsv2", weights=str(checkpoint), architecture=ARCHITECTURE, antialias=antialias)
    result = score(reward, images, PROMPTS, [{}] * 3)
    torch.testing.assert_close(result.values, expected, atol=1e-5, rtol=0)


def test_a_letterbox_by_hand() -> None:
    white = letterbox(torch.ones(1, 3, 4, 8), 4)
    expected = torch.zeros(3, 4, 4)
    expected[:, 1:3] = 1
    expected = (expected - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(white[0], expected)


def test_small_differences_below_eight_bits_are_gone() -> None:
    images = random_images(1)
    assert torch.equal(letterbox(images + 0.4 / 255, 32), letterbox(images, 32))


class _Code:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def drop(state: dict[str, Tensor]) -> None:
    del state["visual.proj"]


def add(state: dict[str, Tensor]) -> None:
    state["score_predictor.weight"] = torch.zeros(1)


def widen(state: dict[str, Tensor]) -> None:
    state["visual.proj"] = torch.zeros(32, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"missing visual\.proj; unexpected none"),
        (add, r"missing none; unexpected score_predictor\.weight"),
        (widen, r"of another shape visual\.proj \[32, 8\] instead of \[32, 16\]"),
    ],
)
def test_other_weights_are_named(
    checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    change(content["state_dict"])
    torch.save(content, tmp_path / "other.pt")
    reward = HPSv2(str(tmp_path / "other.pt"), architecture=ARCHITECTURE)
    with pytest.raises(RewardError, match=message) as error:
        score(reward, random_images(1), ["a cat"], [{}])
    assert str(tmp_path / "other.pt") in str(error.value)


def test_a_damaged_checkpoint_and_one_with_code_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"cannot read .*damaged\.pt as tensors alone"):
        HPSv2(str(damaged), architecture=ARCHITECTURE).encoder  # noqa: B018
    torch.save({"state_dict": {"logit_scale": _Code(tmp_path / "made")}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"(?s)evil\.pt as tensors alone.*never run"):
        HPSv2(str(tmp_path / "evil.pt"), architecture=ARCHITECTURE).encoder  # noqa: B018
    assert not (tmp_path / "made").exists()


def test_missing_weights_are_reported_before_a_model_is_built(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no HPS_v2\.1_compressed\.pt"):
        HPSv2(str(tmp_path)).encoder  # noqa: B018
    with pytest.raises(FileNotFoundError, match=r"cannot fetch HPS_v2\.1_compressed\.pt of xswu/HPSv2"):
        HPSv2().encoder  # noqa: B018
