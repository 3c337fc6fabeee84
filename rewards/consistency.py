"""Consistency of an edit: how little the picture differs from its input image outside of a mask.

The score is 1 for no difference, and lower for larger ones:

    lpips   1 − LPIPS (1801.03924): distance of the features of AlexNet or VGG16, in units that people's judgments set
    ssim    structural similarity (Wang et al. 2004), mean of the three channels; the border is continued outwards
    l2      1 − √(mean squared difference)

Inside the mask the picture takes the pixels of the input image before anything is computed, so nothing there counts. The
mean is over the rest: a place counts with the share of it that is outside. The input image and the mask are resized to the
size of the picture.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.base import Metadata, MetadataError, OnDevice, Scores, all_valid, check_images
from rewards.input_images import read_inputs, read_masks, resize
from rewards.options import check_at_least_one, check_choice
from rewards.random_state import preserved_random_state
from rewards.weights import load_weights, read_tensors

METRICS = ("lpips", "ssim", "l2")
_WINDOW, _SIGMA = 11, 1.5  # of SSIM: size and deviation of the Gaussian, in pixels
_C1, _C2 = 0.01**2, 0.03**2


class _Trunk(NamedTuple):
    """A network of torchvision: the layers whose outputs LPIPS compares, their channels, and the smallest side it takes."""

    layers: tuple[int, ...]
    channels: tuple[int, ...]
    least: int


TRUNKS = {
    "alex": _Trunk((1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31),
    "vgg": _Trunk((3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16),
}


class Consistency(OnDevice):
    """Similarity of the picture and its input image outside of a mask, whose white may change.

    metric: lpips, ssim or l2; the last two need no weights. For lpips: network: alex or vgg; trunk: torchvision's weights of
    that network, a file, by default downloaded; heads: LPIPS's linear layers, a file, by default that in the package lpips.
    """

    name = "consistency"
    needs: tuple[str, ...] = ("images", "metadata")

    def __init__(
        self,
        *,
        metric: str = "lpips",
        network: str = "alex",
        trunk: str | None = None,
        heads: str | None = None,
        batch_size: int = 16,
    ) -> None:
        check_at_least_one(self.name, batch_size=batch_size)
        self.metric, self.batch_size = check_choice(self.name, "metric", metric, METRICS), batch_size
        self.network = check_choice(self.name, "network", network, TRUNKS)
        if metric != "lpips" and (trunk or heads):
            raise ValueError(f"reward 'consistency': trunk and heads are for metric: lpips, found metric: {metric}")
        files = {"trunk": trunk, "heads": heads}
        self.trunk, self.heads = (None if file is None else Path(file).expanduser() for file in files.values())
        for option, file in files.items():
            if file is not None and not Path(file).expanduser().is_file():
                raise ValueError(f"reward 'consistency': {option}: there is no file {file}")
        self._lpips: Lpips | None = None

    def preload(self) -> None:
        """Load the network now, if the metric has one."""
        if self.metric == "lpips" and self._lpips is None:
            self._lpips = load_lpips(self.network, self.trunk, self.heads)

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W] in [0,1]."""
        images = check_images(samples, self.name)
        height, width = images.shape[-2:]
        self.preload()
        device = self._device if self.metric == "lpips" else images.device
        before = [resize(image, height, width) for image in read_inputs(self.name, prompts, metadata)]
        outside = [
            torch.ones(1, height, width) if mask is None else 1 - resize(mask, height, width)
            for mask in read_masks(self.name, prompts, metadata)
        ]
        for row, share in enumerate(outside):
            if share.sum() < 1:
                problem = "less than one pixel is outside of the white of the mask; expected a region that must stay as it was"
                raise MetadataError(self.name, problem, row, prompts[row])
        parts = [torch.zeros(0)]
        for at in range(0, len(prompts), self.batch_size):
            rows = slice(at, at + self.batch_size)
            source, weights = (torch.stack(part[rows]).to(device) for part in (before, outside))
            parts.append(self._score(source, images[rows].to(device), weights).cpu())
        return all_valid(torch.cat(parts).to(samples.device))

    def _score(self, source: Tensor, images: Tensor, outside: Tensor) -> Tensor:
        edited = source + outside * (images - source)
        match self.metric:
            case "l2":
                return 1 - _mean((edited - source).square(), outside).sqrt()
            case "ssim":
                return _mean(ssim_map(source.double(), edited.double()), outside).float()
            case _:
                assert self._lpips is not None
                distances: Tensor = self._lpips.to(images.device)(source, edited, outside)
                return 1 - distances


class Lpips(nn.Module):
    """LPIPS version 0.1: a trunk of torchvision, and a linear layer without bias on the squared difference of each layer."""

    def __init__(self, features: nn.Sequential, trunk: _Trunk) -> None:
        super().__init__()
        self.features, self.trunk = nn.ModuleList([*features.children()][: trunk.layers[-1] + 1]), trunk
        self.heads = nn.ParameterList(torch.zeros(1, channels, 1, 1) for channels in trunk.channels)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)

    def forward(self, one: Tensor, other: Tensor, weights: Tensor) -> Tensor:
        """Return the distances [B] of images [B,3,H,W] in [0,1], as means with weights [B,1,H,W] over places.

        Images that are too small for the trunk are continued outwards, and only their own places count.
        """
        right, below = (max(0, self.trunk.least - side) for side in (one.shape[-1], one.shape[-2]))
        one, other = (F.pad(images, (0, right, 0, below), mode="replicate") for images in (one, other))
        weights = F.pad(weights, (0, right, 0, below))
        total = torch.zeros(len(one), device=one.device)
        for head, first, second in zip(self.heads, self._outputs(one), self._outputs(other), strict=True):
            difference = (head * (first - second).square()).sum(1, keepdim=True)
            total += _mean(difference, F.adaptive_avg_pool2d(weights, difference.shape[-2:]))
        return total

    def _outputs(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of the layers, each of unit length at every place."""
        values, outputs = ((2 * images - 1) - self.shift) / self.scale, []
        for number, layer in enumerate(self.features):
            values = layer(values)
            if number in self.trunk.layers:
                outputs.append(values / (values.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return outputs


@preserved_random_state()
def load_lpips(network: str, trunk: Path | None, heads: Path | None) -> Lpips:
    """Load LPIPS from torchvision's weights of the network (None: downloaded) and LPIPS's linear layers (None: in `lpips`)."""
    from torchvision import models

    build = models.alexnet if network == "alex" else models.vgg16
    features: nn.Sequential
    if trunk is None:
        features = build(weights="DEFAULT").features
    else:
        with torch.device("meta"):  # without the classifier, which has nine tenths of the weights
            features = build().features
        features = features.to_empty(device="cpu")
    # In-place activations would overwrite the outputs of the layers before them.
    features = build(weights="DEFAULT" if trunk is None else None).features
    for layer in features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    if trunk is not None:
        tensors = {name: value for name, value in read_tensors(trunk).items() if name.startswith("features.")}
        load_weights(features, {name.removeprefix("features."): value for name, value in tensors.items()}, trunk)
    lpips = Lpips(features, TRUNKS[network])
    source = _find_heads(network) if heads is None else heads
    found = {
        name.removeprefix("lin").replace(".model.1.weight", ""): value for name, value in read_tensors(source).items()
    }
    load_weights(lpips.heads, found, source)
    return lpips.eval()


def _find_heads(network: str) -> Path:
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise FileNotFoundError(
            f"the linear layers of LPIPS are in the package lpips, which is not installed: `pip install lpips`, or set heads "
            f"to its file weights/v0.1/{network}.pth, or metric: ssim, which needs no weights"
        )
    return Path(package.origin).parent / "weights" / "v0.1" / f"{network}.pth"


def ssim_map(one: Tensor, other: Tensor) -> Tensor:
    """Return SSIM [B,3,H,W] of images [B,3,H,W] in [0,1] at every place. Pixels beyond the border equal the nearest one."""
    offsets = torch.arange(_WINDOW, dtype=one.dtype, device=one.device) - _WINDOW // 2
    window = torch.softmax(-(offsets**2) / (2 * _SIGMA**2), 0)
    kernel = (window[:, None] * window).expand(one.shape[1], 1, -1, -1)

    def average(values: Tensor) -> Tensor:
        return F.conv2d(F.pad(values, (_WINDOW // 2,) * 4, mode="replicate"), kernel, groups=values.shape[1])

    mean, mean_other = average(one), average(other)
    variance, variance_other = average(one**2) - mean**2, average(other**2) - mean_other**2
    covariance = average(one * other) - mean * mean_other
    means = (2 * mean * mean_other + _C1) / (mean**2 + mean_other**2 + _C1)
    return means * (2 * covariance + _C2) / (variance + variance_other + _C2)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return means [B] of values [B,C,H,W], with weights [B,1,H,W] over places."""
    return (values.mean(1, keepdim=True) * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))
