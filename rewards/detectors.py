"""Object detectors behind the GenEval reward, and the one for the shapes world: classical vision.

Photographs are for rewards.transformers_detector.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from rewards.classes import check_known

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 50, 47),
    "green": (60, 160, 60),
    "blue": (50, 90, 220),
    "yellow": (235, 190, 40),
}
BACKGROUND: tuple[int, int, int] = (245, 245, 240)
COLORS: tuple[str, ...] = tuple(PALETTE)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
UNKNOWN = "unknown"

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


Wanted = Sequence[Collection[str]]  # for each image the names of the classes that its metadata name


class Detection(NamedTuple):
    """One object found in an image."""

    label: str  # as the metadata name the class, where they name it
    color: str | None  # None: the detector does not judge colours
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
    score: float  # confidence in [0,1]
    mask: Mask | None = None  # [H,W]


class Detector(Protocol):
    """Finds objects in images [B,3,H,W] in [0,1]; one list of detections an image, in any order.

    ``wanted`` are the classes that may be asked for ("*": any). A detector may look for these alone, must
    report them under these names, and raises an UnknownClass for one that it can never find: without it a class
    that nobody looks for would be a 0 for every image.
    """

    def __call__(self, images: Tensor, wanted: Wanted | None = None) -> list[list[Detection]]: ...

    def to(self, device: torch.device | str) -> Detector: ...


@dataclass(frozen=True)
class ShapesDetector:
    """Flat coloured circles, squares and triangles on a light background, without a learned part.

    Each pixel is unmixed into background + a·(colour − background); the colour that explains it best wins and
    a is its coverage, so that anti-aliased edges keep their object's colour (the plain nearest colour would
    call the rim of a red disc yellow). Connected pixels with a ≥ ½ are a candidate. Its coverage's first and
    second moments fix centre, width and height of the ideal shape of each class, and the overlap (sum of
    minima over sum of maxima) with that ideal shape decides: a smear, a ring or two merged objects overlap
    with none and are reported as `unknown`, as are blobs of no palette colour. Blobs below ``min_blob`` are
    ignored.

    Where it ends: a square is read up to a turn of 10°, a triangle up to 8°. An object that the border, or
    another object before it, cuts by a sixth of its width is read, one cut by a third is unknown. Two of one
    colour that touch are one unknown; half a pixel between them is enough to part them.

    Lengths are in units of a 32-pixel-wide image. The whole batch is processed at once.
    """

    min_area: float = 20.0  # pixels of an object that are at least half covered
    min_blob: float = 10.0  # what is larger than this and no object is `unknown`
    # Of circle, square and triangle. Blur costs triangles most; a turned square reaches 0.83 as a circle.
    min_overlap: tuple[float, float, float] = (0.87, 0.85, 0.82)
    max_aspect: float = 1.35
    min_coverage: float = 0.8  # mean coverage within the candidate: low for a washed-out one
    max_residual: float = 0.16  # mean distance from the unmixed colour within the candidate, RGB in [0,1]
    off_palette: float = 0.28  # a single pixel further from every mixture than this has no palette colour
    keep_masks: bool = False

    def to(self, device: torch.device | str) -> ShapesDetector:
        """The detector runs on the CPU wherever the images are."""
        return self

    def __call__(self, images: Tensor, wanted: Wanted | None = None) -> list[list[Detection]]:
        """Detect objects in images [B,3,H,W] in [0,1]."""
        check_known(wanted or (), (*SHAPES, UNKNOWN), "the detector of the shapes world")
        pixels = images.detach().to("cpu", torch.float32).permute(0, 2, 3, 1).numpy()
        found: list[list[Detection]] = [[] for _ in range(len(pixels))]
        if pixels.size == 0:
            return found
        unmixed = _unmix(pixels, self.off_palette)
        labels, count = _components(unmixed.masks)
        unit = (pixels.shape[2] / 32.0) ** 2
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        places = ndimage.find_objects(labels)
        for index in np.flatnonzero(sizes >= self.min_blob * unit):
            image, channel, rows, columns = places[index]
            region = labels[image.start, channel.start] == index + 1
            label, score = self._classify(unmixed, region, places[index], unit)
            color = COLORS[channel.start] if channel.start < len(COLORS) else None
            box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
            mask = region if self.keep_masks else None
            found[image.start].append(Detection(label, color, box, score, mask))
        return found

    def _classify(self, unmixed: _Unmixed, region: Mask, place: tuple[slice, ...], unit: float) -> tuple[str, float]:
        """The class of one candidate and its score in (0.9, 1], or (`unknown`, 1)."""
        image, color = place[0].start, place[1].start
        window = _grown(place[2], region.shape[0]), _grown(place[3], region.shape[1])
        mask = region[window]
        if color >= len(COLORS) or mask.sum() < self.min_area * unit:
            return UNKNOWN, 1.0
        cover = unmixed.coverage[(image, color, *window)]
        residual = unmixed.residual[(image, *window)]
        if cover[mask].mean() < self.min_coverage or residual[mask].mean() > self.max_residual:
            return UNKNOWN, 1.0
        # The rim: half-covered pixels beside the candidate that belong to no other one.
        taken = unmixed.masks[(image, slice(None), *window)].any(0)
        own = mask | (ndimage.binary_dilation(mask, _NEIGHBOURS) & ~taken)
        return self._compare(np.where(own, cover, 0.0).astype(np.float32))

    def _compare(self, cover: Array) -> tuple[str, float]:
        """The class whose ideal shape with the moments of ``cover`` [h,w] overlaps it most, if enough."""
        (x, y), (spread_x, spread_y) = _moments(cover)
        if max(spread_x, spread_y) > self.max_aspect * min(spread_x, spread_y):
            return UNKNOWN, 1.0
        ideal = np.stack([draw(cover.shape, x, y, spread_x, spread_y) for draw in _IDEALS])
        overlaps = np.minimum(ideal, cover).sum((1, 2)) / np.maximum(ideal, cover).sum((1, 2))
        best = int(overlaps.argmax())
        if overlaps[best] < self.min_overlap[best]:
            return UNKNOWN, 1.0
        return SHAPES[best], 0.9 + 0.1 * float(overlaps[best])


class _Unmixed(NamedTuple):
    """Pixels [B,H,W,3] explained as mixtures of the background with one colour."""

    coverage: Array  # [B,C,H,W], by each colour as if there were no other
    residual: Array  # [B,H,W], distance from the best mixture
    masks: Mask  # [B,C+1,H,W], at least half covered by the best colour; last, the pixels that none explains


def _unmix(pixels: Array, off_palette: float) -> _Unmixed:
    background = np.asarray(BACKGROUND, np.float32) / 255
    rays = np.asarray(list(PALETTE.values()), np.float32) / 255 - background  # [C,3]
    offset = pixels - background
    mixture = np.clip(offset @ (rays / (rays**2).sum(1, keepdims=True)).T, 0.0, 1.0)  # [B,H,W,C]
    # ‖offset − a·ray‖² = ‖offset‖² − 2a·(offset·ray) + a²·‖ray‖², without a [B,H,W,C,3] array.
    squared = (offset**2).sum(-1)[..., None] - 2 * mixture * (offset @ rays.T) + mixture**2 * (rays**2).sum(1)
    channel = squared.argmin(-1)
    residual = np.sqrt(np.maximum(squared.min(-1), 0.0))
    half = np.take_along_axis(mixture, channel[..., None], -1)[..., 0] >= 0.5
    odd = residual > off_palette
    channel = np.where(odd, len(PALETTE), channel)
    masks = (channel[:, None] == np.arange(len(PALETTE) + 1)[:, None, None]) & (half | odd)[:, None]
    return _Unmixed(mixture.transpose(0, 3, 1, 2), residual, masks)


def _components(masks: Mask) -> tuple[NDArray[np.int32], int]:
    """Number the 4-connected regions of masks [B,C,H,W]; regions never join across images or colours."""
    structure = np.zeros((3, 3, 3, 3), dtype=bool)
    structure[1, 1] = ndimage.generate_binary_structure(2, 1)
    labels, count = ndimage.label(masks, structure)
    return labels, int(count)


def _grown(window: slice, size: int) -> slice:
    """The window with a margin of two pixels, for the anti-aliased rim."""
    return slice(max(window.start - 2, 0), min(window.stop + 2, size))


def _moments(cover: Array) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centre (x, y) and standard deviations of the coverage [h,w] taken as a density, in pixels."""
    total = float(cover.sum())
    across, down = cover.sum(0) / total, cover.sum(1) / total
    columns, rows = np.arange(len(across)), np.arange(len(down))
    x, y = float(across @ columns), float(down @ rows)
    # A pixel is a unit square, not a point: 1/12 is its own variance.
    spread_x = float(across @ (columns - x) ** 2) + 1 / 12
    spread_y = float(down @ (rows - y) ** 2) + 1 / 12
    return (x, y), (spread_x**0.5, spread_y**0.5)


def _grid(shape: tuple[int, ...], x: float, y: float) -> tuple[Array, Array]:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (columns - x).astype(np.float32), (rows - y).astype(np.float32)


def _circle(shape: tuple[int, ...], x: float, y: float, spread_x: float, spread_y: float) -> Array:
    """Coverage of the ellipse with these moments: along an axis a disc of radius r has variance r²/4."""
    right, down = _grid(shape, x, y)
    radius_x, radius_y = 2 * spread_x, 2 * spread_y
    inward = (1 - np.sqrt((right / radius_x) ** 2 + (down / radius_y) ** 2)) * (radius_x * radius_y) ** 0.5
    coverage: Array = np.clip(inward + 0.5, 0.0, 1.0)
    return coverage


def _square(shape: tuple[int, ...], x: float, y: float, spread_x: float, spread_y: float) -> Array:
    """Coverage of the rectangle with these moments: the variance of an interval of length w is w²/12."""
    right, down = _grid(shape, x, y)
    half_x, half_y = 3**0.5 * spread_x, 3**0.5 * spread_y
    across: Array = np.clip(half_x - np.abs(right) + 0.5, 0, 1)
    return across * np.clip(half_y - np.abs(down) + 0.5, 0, 1)


def _triangle(shape: tuple[int, ...], x: float, y: float, spread_x: float, spread_y: float) -> Array:
    """Coverage of the upright triangle with these moments: variances w²/24 and h²/18, centre at 2h/3."""
    right, down = _grid(shape, x, y)
    width, height = 24**0.5 * spread_x, 18**0.5 * spread_y
    below_apex = down + height * 2 / 3
    slant = (below_apex * width / (2 * height) - np.abs(right)) / (1 + (width / (2 * height)) ** 2) ** 0.5
    return np.clip(slant + 0.5, 0.0, 1.0) * np.clip(height / 3 - down + 0.5, 0.0, 1.0)


_IDEALS = (_circle, _square, _triangle)  # in the order of SHAPES
_NEIGHBOURS = np.ones((3, 3), dtype=bool)
