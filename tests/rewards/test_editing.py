"""Rewards of edits: closed forms, agreement with independent implementations, and errors of the metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torchvision import models

from rewards import Consistency, RewardError, make, score
from rewards.base import MetadataError
from rewards.clip_direction import directional_similarity
from tests.tiny_clip import ARCHITECTURE, random_images, tiny_clip, tiny_open_clip


def saved(folder: Path, name: str, image: Tensor) -> str:
    """Save an image [3,H,W] or a mask [1,H,W], and return its absolute path."""
    pixels = image.expand(3, -1, -1).mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(folder / name)
    return str(folder / name)


def consistency(images: Tensor, metadata: list[dict[str, Any]], **options: Any) -> list[float]:
    return score(make("consistency", **options), images, ["edit"] * len(images), metadata).values.tolist()


def test_directional_similarity_by_hand() -> None:
    """Along the captions' direction, against it, across it, at 60 degrees, and without a change."""
    zero, x, y = torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    after = torch.stack([3 * x, -x, y, x + 3**0.5 * y, zero])
    before, source, target = zero.expand(5, 2), zero.expand(5, 2), x.expand(5, 2)
    assert directional_similarity(before, after, source, target).tolist() == pytest.approx([1, -1, 0, 0.5, 0])
    shift = torch.tensor([0.3, -0.7])
    moved = directional_similarity(before + shift, after + shift, source - shift, target - shift)
    assert moved.tolist() == pytest.approx([1, -1, 0, 0.5, 0], abs=1e-6)


@pytest.mark.parametrize("backend", ["transformers", "open_clip"])
def test_clip_direction_is_the_cosine_of_differences_of_the_models_embeddings(tmp_path: Path, backend: str) -> None:
    """Inputs of two sizes, one in two rows, against the embeddings of each picture and caption alone. In batches of 2."""
    if backend == "open_clip":
        options = {"model": ARCHITECTURE, "backend": backend, "pretrained": str(tiny_open_clip(tmp_path))}
    else:
        options = {"model": str(tiny_clip(tmp_path / "clip"))}
    reward = make("clip_direction", **options, batch_size=2)
    outputs, inputs = random_images(3), [random_images(1, seed=1)[0], random_images(1, 33, 50, seed=2)[0]]
    paths = [saved(tmp_path, f"{i}.png", image) for i, image in enumerate(inputs)]
    rows = [(0, "a cat", "a black cat"), (1, "a dog", "a cat"), (0, "a cat", "two cats")]
    metadata = [{"image": paths[i], "source": source, "target": target} for i, source, target in rows]
    found = score(reward, outputs, ["edit"] * 3, metadata)
    encoder = reward.encoder  # type: ignore[attr-defined]
    expected = []
    for output, (i, source, target) in zip(outputs, rows, strict=True):
        after, before = (encoder.images(image[None])[0].detach().numpy() for image in (output, inputs[i]))
        end, start = (encoder.texts([text])[0].detach().numpy() for text in (target, source))
        one, other = after - before, end - start
        expected.append(float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)))
    assert found.values.tolist() == pytest.approx(expected, abs=2e-5)
    assert found.valid.all()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image": None}, "the metadata have no input image; rows of prompts name it as `image`"),
        ({"image": "cat.png"}, "`image` in the metadata is 'cat.png', expected an absolute path"),
        ({"image": "/no/such/file.png"}, "`image` in the metadata: /no/such/file.png: there is no such file"),
        ({"source": None}, "`source` in the metadata is None, expected a caption of the input image"),
        ({"target": " "}, "`target` in the metadata is ' ', expected a caption of the output that is wanted"),
        ({"target": "a cat"}, "`source` and `target` in the metadata are both 'a cat', so there is no direction"),
    ],
)
def test_clip_direction_names_the_row_whose_metadata_do_not_fit(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    """Before the model is loaded: there is none here."""
    row = {"image": saved(tmp_path, "a.png", random_images(1)[0]), "source": "a cat", "target": "a dog"}
    with pytest.raises(MetadataError, match=r"failed at row 1 \(prompt 'two'\): ") as caught:
        score(make("clip_direction", model="no/model"), random_images(2), ["one", "two"], [row, {**row, **change}])
    assert problem in str(caught.value)


def test_l2_by_hand(tmp_path: Path) -> None:
    """A quarter of the places differs by 0.4, all of them, or those under the mask; a mask of half the size is resized."""
    black = torch.zeros(3, 8, 8)
    edited = black.clone()
    edited[:, :4, :4] = 0.4
    mask, small = torch.zeros(1, 8, 8), torch.zeros(1, 4, 4)
    mask[:, :4, :4] = 1
    small[:, :, :] = 0
    source = saved(tmp_path, "black.png", black)
    masks = {"same": saved(tmp_path, "mask.png", mask), "none": saved(tmp_path, "small.png", small)}
    rows: list[dict[str, Any]] = [{"image": source}, {"image": source, "mask": masks["same"]}]
    rows += [{"image": source, "mask": masks["none"]}, {"image": source}]
    images = torch.stack([edited, edited, edited, black])
    assert consistency(images, rows, metric="l2") == pytest.approx([1 - 0.2, 1, 1 - 0.2, 1], abs=1e-6)
    inside = black.clone()
    inside[:, 7, 7] = 0.8  # one of the 48 places outside
    assert consistency(inside[None], [rows[1]], metric="l2") == pytest.approx([1 - (0.64 / 48) ** 0.5], abs=1e-6)


def test_ssim_is_that_of_an_independent_implementation(tmp_path: Path) -> None:
    """scipy's Gaussian filter, at each channel, with the border continued."""
    one, other = random_images(2, 40, 56)
    path = saved(tmp_path, "a.png", one)

    def blur(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, (0, 1.5, 1.5), truncate=3.4, mode="nearest")

    x, y = one.double().numpy(), other.double().numpy()
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    expected = ((2 * mx * my + 1e-4) * (2 * cov + 9e-4)) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    (found,) = consistency(other[None], [{"image": path}], metric="ssim")
    assert found == pytest.approx(expected.mean(), abs=1e-5)
    assert consistency(one[None], [{"image": path}], metric="ssim") == pytest.approx([1])


CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


def build_features(network: str) -> torch.nn.Sequential:
    """Return the convolutional layers of torchvision's network with random weights."""
    with torch.device("meta"):
        features: torch.nn.Sequential = (models.alexnet if network == "alex" else models.vgg16)().features
    features = features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weights in features.parameters():
        scale = 0.1 if weights.ndim == 1 else weights[0].numel() ** -0.5
        weights.data.copy_(scale * torch.randn(weights.shape, generator=generator))
    return features


def trunk_and_heads(folder: Path, network: str) -> dict[str, str]:
    """Save random weights of torchvision's network and of LPIPS's linear layers, as both are published."""
    state = {f"features.{name}": value for name, value in build_features(network).state_dict().items()}
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, folder / "trunk.pth")
    generator = torch.Generator().manual_seed(1)
    shapes = {f"lin{i}.model.1.weight": (1, count, 1, 1) for i, count in enumerate(CHANNELS[network])}
    torch.save({name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}, folder / "heads.pth")
    return {"network": network, "trunk": str(folder / "trunk.pth"), "heads": str(folder / "heads.pth")}


@pytest.mark.parametrize("network", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_lpips_is_its_formula_on_torchvisions_network(tmp_path: Path, network: str) -> None:
    """d = Σ over layers of the mean over places of Σ over channels w (â − b̂)²."""
    options = trunk_and_heads(tmp_path, network)
    one, other = random_images(2, 64, 48)
    path = saved(tmp_path, "a.png", one)
    features = build_features(network)
    ends = (1, 4, 7, 9, 11) if network == "alex" else (3, 8, 15, 22, 29)
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    distance = 0.0
    for end, weight in zip(ends, torch.load(options["heads"], weights_only=True).values(), strict=True):
        with torch.no_grad():
            normalised = [((2 * image - 1 - mean[:, None, None]) / std[:, None, None])[None] for image in (one, other)]
            outputs = [features[: end + 1](image) for image in normalised]
        a, b = (value / value.norm(dim=1, keepdim=True).clamp(min=1e-10) for value in outputs)
        distance += float((weight * (a - b) ** 2).sum(1).mean())
    assert consistency(other[None], [{"image": path}], **options) == pytest.approx([1 - distance], abs=1e-5)
    assert consistency(one[None], [{"image": path}], **options) == [1]


@pytest.mark.parametrize("metric", ["l2", "ssim", "lpips"])
def test_nothing_inside_the_mask_counts_and_everything_outside_does(tmp_path: Path, metric: str) -> None:
    options = {"metric": metric, **(trunk_and_heads(tmp_path, "alex") if metric == "lpips" else {})}
    source = random_images(1, 64, 64)[0]
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    row = {"image": saved(tmp_path, "a.png", source), "mask": saved(tmp_path, "m.png", mask)}
    inside, outside = source.clone(), source.clone()
    inside[:, 20:40, 20:40] = 1 - inside[:, 20:40, 20:40]
    outside[:, :6, :6] = 1 - outside[:, :6, :6]
    scores = consistency(torch.stack([source, inside, outside]), [row] * 3, **options)
    assert scores[0] == scores[1] == 1
    assert scores[2] < 0.99
    assert consistency(inside[None], [{"image": row["image"]}], **options)[0] < 0.99


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (3, 5), (40, 2)])
@pytest.mark.parametrize("metric", ["l2", "ssim", "lpips"])
def test_small_pictures_and_inputs_of_another_size(tmp_path: Path, metric: str, size: tuple[int, int]) -> None:
    """Inputs of one colour, so that the resized input is known."""
    options = {"metric": metric, **(trunk_and_heads(tmp_path, "alex") if metric == "lpips" else {})}
    row = {"image": saved(tmp_path, "a.png", torch.full((3, 17, 9), 0.4))}
    images = torch.stack([torch.full((3, *size), 0.4), torch.rand(3, *size)])
    same, other = consistency(images, [row, row], **options)
    assert same == pytest.approx(1, abs=1e-5)
    assert other < same


def test_a_mask_that_covers_everything_is_named(tmp_path: Path) -> None:
    source = saved(tmp_path, "a.png", torch.zeros(3, 8, 8))
    row = {"image": source, "mask": saved(tmp_path, "m.png", torch.ones(1, 5, 5))}
    with pytest.raises(MetadataError, match=r"row 1 .*less than one pixel is outside of the white of the mask"):
        consistency(torch.zeros(2, 3, 8, 8), [{"image": source}, row], metric="l2")


def test_options_of_consistency(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metric is 'psnr', expected one of lpips, ssim, l2"):
        Consistency(metric="psnr")
    with pytest.raises(ValueError, match="trunk: there is no file nowhere"):
        Consistency(trunk="nowhere")
    with pytest.raises(ValueError, match="trunk and heads are for metric: lpips, found metric: l2"):
        Consistency(metric="l2", heads="heads.pth")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    """The message names the file, and tensors that differ."""
    options = {**trunk_and_heads(tmp_path, "alex"), "network": "vgg"}
    row = {"image": saved(tmp_path, "a.png", torch.zeros(3, 8, 8))}
    with pytest.raises(RewardError, match=r"the weights in .*trunk.pth are not those of Sequential: missing"):
        consistency(torch.zeros(1, 3, 8, 8), [row], **options)


def test_linear_layers_that_are_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = trunk_and_heads(tmp_path, "alex")
    del options["heads"]
    row = {"image": saved(tmp_path, "a.png", torch.zeros(3, 8, 8))}
    with pytest.raises(
        RewardError, match=r"`pip install lpips`, or set heads .*or metric: ssim, which needs no weights"
    ):
        consistency(torch.zeros(1, 3, 8, 8), [row], **options)
