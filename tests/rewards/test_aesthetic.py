"""Tests of the aesthetic predictor against matrix products in float64, with layers saved under the published names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards import Aesthetic, RewardError, make, score
from rewards.pictures import to_pictures
from tests.tiny_clip import random_images, tiny_clip

IMAGES = random_images(3)
FILE = "sac+logos+ava1-l14-linearMSE.pth"
SHAPES = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


def published_layers() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer, (rows, columns) in SHAPES.items():
        state[f"layers.{layer}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5
        state[f"layers.{layer}.bias"] = torch.randn(rows, generator=generator)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny CLIP, whose embeddings are as wide as those of ViT-L/14, and with the layers."""
    folder = tmp_path_factory.mktemp("aesthetic")
    tiny_clip(folder, width=768)
    torch.save(published_layers(), folder / FILE)
    return folder


def test_equals_the_layers_one_after_the_other(folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    inputs = CLIPProcessor.from_pretrained(folder, backend="pil")(images=to_pictures(IMAGES), return_tensors="pt")
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folder).eval().get_image_features(**inputs).pooler_output.double()
    rating = features / features.norm(dim=-1, keepdim=True)
    for layer in SHAPES:
        weight, bias = (published_layers()[f"layers.{layer}.{part}"].double() for part in ("weight", "bias"))
        rating = rating @ weight.T + bias
    reward = make("aesthetic", model=str(folder), head=str(folder))
    result = score(reward, IMAGES, ["a cat", "", "a dog"], [{}] * 3)
    torch.testing.assert_close(result.values, rating[:, 0].float(), atol=1e-5, rtol=1e-5)
    assert result.values.std() > 1e-3
    assert torch.equal(score(reward, IMAGES, ["other"] * 3, [{}] * 3).values, result.values)


def test_layers_for_another_width_are_named(folder: Path, tmp_path: Path) -> None:
    narrow = tiny_clip(tmp_path)
    with pytest.raises(RewardError, match=r"layers\.0\.weight \[1024, 768\] instead of \[1024, 16\]") as error:
        score(Aesthetic(str(narrow), str(folder / FILE)), IMAGES, [""] * 3, [{}] * 3)
    assert FILE in str(error.value)


def test_other_layers_are_named(folder: Path, tmp_path: Path) -> None:
    """Layers with activations between them, as in another file of the same source, have other numbers."""
    state = published_layers()
    state["layers.3.weight"] = state.pop("layers.2.weight")
    torch.save(state, tmp_path / FILE)
    with pytest.raises(RewardError, match=r"missing layers\.2\.weight; unexpected layers\.3\.weight"):
        score(Aesthetic(str(folder), str(tmp_path)), IMAGES, [""] * 3, [{}] * 3)


class _Code:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


def test_damaged_layers_and_code_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.pth").write_bytes((folder / FILE).read_bytes()[:1000])
    with pytest.raises(RewardError, match=r"(?s)cannot read .*damaged\.pth as tensors alone"):
        score(Aesthetic(str(folder), str(tmp_path / "damaged.pth")), IMAGES, [""] * 3, [{}] * 3)
    torch.save({**published_layers(), "layers.7.bias": _Code(tmp_path / "made")}, tmp_path / "evil.pth")
    with pytest.raises(RewardError, match="contains code, which is never run"):
        score(Aesthetic(str(folder), str(tmp_path / "evil.pth")), IMAGES, [""] * 3, [{}] * 3)
    assert not (tmp_path / "made").exists()
