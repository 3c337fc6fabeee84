"""Tests of CLIP scores against the libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from rewards import make, score
from rewards.pictures import to_pictures
from tests.tiny_clip import ARCHITECTURE, SIZE, random_images, tiny_clip, tiny_open_clip

IMAGES = random_images(4)
PROMPTS = ["a red cat", "a blue dog", "a red cat", "two cats and " * 20]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_open_clip(tmp_path_factory.mktemp("open_clip"))


def scored(**options: str) -> Tensor:
    return score(make("clip_score", **options), IMAGES, PROMPTS, [{}] * 4).values


def preprocessed() -> Tensor:
    """Return OpenAI's preprocessing of pictures by torchvision's transforms."""
    resize = transforms.Resize(SIZE, interpolation=InterpolationMode.BICUBIC)
    steps = [resize, transforms.CenterCrop(SIZE), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return torch.stack([transforms.Compose(steps)(picture) for picture in to_pictures(IMAGES)])


@torch.no_grad()
def logits_of_transformers(clip: Path) -> Tensor:
    from transformers import AutoTokenizer, CLIPModel

    tokens = AutoTokenizer.from_pretrained(clip)(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape == (4, 77)
    model = CLIPModel.from_pretrained(clip).eval()
    return model(pixel_values=preprocessed(), **tokens).logits_per_image.diagonal()


@torch.no_grad()
def logits_of_open_clip(checkpoint: Path) -> Tensor:
    import open_clip

    model = open_clip.create_model(ARCHITECTURE, pretrained=str(checkpoint)).eval()
    return model.get_logits(preprocessed(), open_clip.get_tokenizer(ARCHITECTURE)(PROMPTS))[0].diagonal()


def test_equals_transformers(clip: Path) -> None:
    logits = logits_of_transformers(clip)
    torch.testing.assert_close(scored(model=str(clip), value="logit"), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored(model=str(clip)), logits / 50, atol=1e-5, rtol=0)


def test_equals_open_clip(checkpoint: Path) -> None:
    logits = logits_of_open_clip(checkpoint)
    options = {"model": ARCHITECTURE, "backend": "open_clip", "pretrained": str(checkpoint)}
    torch.testing.assert_close(scored(**options, value="logit"), logits, atol=1e-5, rtol=1e-5)
    # The scale in the file is in half precision.
    torch.testing.assert_close(scored(**options), logits / 50, atol=1e-3, rtol=0)


def test_clipscore_is_clamped_below_zero(checkpoint: Path) -> None:
    options = {"model": ARCHITECTURE, "backend": "open_clip", "pretrained": str(checkpoint)}
    cosines = scored(**options)
    assert cosines.min() < 0 < cosines.max()
    expected = torch.tensor([2.5 * max(float(cosine), 0.0) for cosine in cosines])
    torch.testing.assert_close(scored(**options, value="clipscore"), expected)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'jax', expected one of transformers, open_clip"):
        make("clip_score", backend="jax")
    with pytest.raises(ValueError, match="value is 'dot', expected one of cosine, logit, clipscore"):
        make("clip_score", value="dot")
    with pytest.raises(ValueError, match="pretrained='openai' is for backend=open_clip"):
        make("clip_score", pretrained="openai")
