"""Tests of PickScore against transformers, with model and processor in separate folders."""

from __future__ import annotations

import shutil

import pytest
import torch

from rewards import PickScore, make, score
from rewards.pictures import to_pictures
from tests.tiny_clip import random_images, tiny_clip

IMAGES = random_images(3, 56, 40)
PROMPTS = ["a red cat", "a blue dog", "a red cat on a mat " * 10]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A folder with a model alone, like PickScore's, and a folder with another model and the processor."""
    folder = tmp_path_factory.mktemp("pickscore")
    base, model = tiny_clip(folder / "base", seed=1), folder / "tuned"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_clip(folder / "whole") / name, model / name)
    return str(model), str(base)


def test_equals_the_published_formula(folders: tuple[str, str]) -> None:
    from transformers import CLIPModel, CLIPProcessor

    model, base = folders
    clip = CLIPModel.from_pretrained(model).eval()
    inputs = CLIPProcessor.from_pretrained(base, backend="pil")(
        images=to_pictures(IMAGES), text=PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        output = clip(**inputs)
        images, texts = (x / x.norm(dim=-1, keepdim=True) for x in (output.image_embeds, output.text_embeds))
        expected = (clip.logit_scale.exp() * (texts @ images.T)).diag()
    result = score(PickScore(model, base), IMAGES, PROMPTS, [{}] * 3)
    torch.testing.assert_close(result.values, expected, atol=1e-5, rtol=1e-5)
    divided = score(make("pickscore", model=model, processor=base, divisor=26.0), IMAGES, PROMPTS, [{}] * 3)
    torch.testing.assert_close(divided.values, expected / 26)


def test_the_published_ids_are_the_defaults() -> None:
    """The test is offline, so the error contains the file that would have been downloaded."""
    with pytest.raises(ValueError, match=r"cannot load the CLIP model yuvalkirstain/PickScore_v1: .*connect"):
        PickScore().encoder  # noqa: B018


def test_a_divisor_must_be_positive() -> None:
    with pytest.raises(ValueError, match="divisor is 0"):
        make("pickscore", divisor=0)
