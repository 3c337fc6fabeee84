"""The interface of object detectors for the GenEval reward, and a detector by classical vision for the shapes task.

Detectors for photographs are in rewards.transformers_detector.
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

from rewards.classes import check_classes

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 50, 47),
    "green": (60, 160, 60),
    "blue": (50, 90, 220),
    "yellow": (235, 190, 40),
}
BACKGROUND: tuple[int, int, int] = (245, 245, 240)
COLORS: tuple[str, ...] = tuple(PALETTE)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
UNKNOWN_SHAPE = "unknown"

Float32Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
BLOCK = 2**20  # pixels that are unmixed at a time

ClassNames = Sequence[Collection[str]]
"""The classes in the metadata of each image."""


class Detection(NamedTuple):
    """One object found in an image."""

    label: str  # class, with the metadata's name if they contain it
    color: str | None  # None: the detector does not report colours
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
    score: float  # confidence in [0,1]
    mask: Mask | None = None  # [H,W]


class Detector(Protocol):
    """A detector of objects in images [B,3,H,W] in [0,1]. It returns a list of detections an image, in any order.

    ``wanted`` are the classes in the metadata of each image ("*": any). A detector may look for these alone. It must report
    them under these names, and raise UnknownClass for a class that it can never find: otherwise such a class would silently
    score 0 for every image.
    """

    def __call__(self, images: Tensor, wanted: ClassNames | None = None) -> list[list[Detection]]: ...

    def to(self, device: torch.device | str) -> Detector: ...


@dataclass(frozen=True)
class ShapesDetector:
    """Detector of flat coloured circles, squares and triangles on a light background, without a learned part.

    Each pixel is unmixed into background + a·(colour − background). The colour that explains it best is its colour, and
    a is its coverage. So anti-aliased edges keep their object's colour (by the nearest colour, the rim of a red disc would
    be yellow). Connected pixels with a ≥ ½ are a candidate. The first and second moments of its coverage determine centre,
    width and height of the ideal shape of each class. The class is the one whose ideal shape overlaps it most (sum of minima
    over sum of maxima). A smear, a ring or two merged objects overlap with none and are reported as `unknown`; so are blobs
    of no palette colour. Blobs below ``min_blob`` are ignored.

    Limits: a square is recognised up to a rotation of 10°, a triangle up to 8°. An object of which the border or another
    object hides a sixth of the width is recognised; if a third is hidden, it is unknown. Two objects of one colour that
    touch are one unknown object; a gap of half a pixel separates them.

    Areas are in pixels of a 32-pixel-wide image. The whole batch is processed at once.
    """

    min_area: float = 20.0  # pixels of an object that are at least half covered
    min_blob: float = 10.0  # larger blobs that are not objects are `unknown`
    # For circle, square and triangle. Blur affects triangles most; a rotated square reaches 0.83 as a circle.
    min_overlap: tuple[float, float, float] = (0.87, 0.85, 0.82)
    max_aspect: float = 1.35
    min_coverage: float = 0.8  # mean coverage within the candidate, which is low for pale objects
    max_residual: float = 0.16  # mean distance from the unmixed colour within the candidate, RGB in [0,1]
    off_palette: float = 0.28  # pixels further than this from every mixture have no palette colour
    keep_masks: bool = False

    def to(self, device: torch.device | str) -> ShapesDetector:
        """Return the detector unchanged: it always runs on the CPU."""
        return self

    def __call__(self, images: Tensor, wanted: ClassNames | None = None) -> list[list[Detection]]:
        """Detect objects in images [B,3,H,W] in [0,1]."""
        check_classes(wanted or (), (*SHAPES, UNKNOWN_SHAPE), "the detector of the shapes task")
        pixels = images.detach().to("cpu", torch.float32).permute(0, 2, 3, 1).numpy()
        found: list[list[Detection]] = [[] for _ in range(len(pixels))]
        if pixels.size == 0:
            return found
        unmixed = _unmix(pixels, self.off_palette)
        unit = (pixels.shape[2] / 32.0) ** 2
        for channel in range(unmixed.masks.shape[1]):
            labels = _label_blobs(unmixed.masks[:, channel], self.min_blob * unit)
            for index, (image, rows, columns) in enumerate(ndimage.find_objects(labels), 1):
                region = labels[image.start] == index
                place = (image, slice(channel, channel + 1), rows, columns)
                label, score = self._classify(unmixed, region, place, unit)
                color = COLORS[channel] if channel < len(COLORS) else None
                box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
                mask = region if self.keep_masks else None
                found[image.start].append(Detection(label, color, box, score, mask))
        return found

    def _classify(self, unmixed: _Unmixed, region: Mask, place: tuple[slice, ...], unit: float) -> tuple[str, float]:
        """Return the class of a candidate and its score in (0.9, 1], or (`unknown`, 1)."""
        image, color = place[0].start, place[1].start
        window = _grown(place[2], region.shape[0]), _grown(place[3], region.shape[1])
        mask = region[window]
        if color >= len(COLORS) or mask.sum() < self.min_area * unit:
            return UNKNOWN_SHAPE, 1.0
        cover = unmixed.coverage[(image, color, *window)]
        residual = unmixed.residual[(image, *window)]
        if cover[mask].mean() < self.min_coverage or residual[mask].mean() > self.max_residual:
            return UNKNOWN_SHAPE, 1.0
        # Add the rim: partly covered pixels beside the candidate that belong to no other candidate.
        taken = unmixed.masks[(image, slice(None), *window)].any(0)
        own = mask | (ndimage.binary_dilation(mask, _NEIGHBOURS) & ~taken)
        return self._best_shape(np.where(own, cover, 0.0).astype(np.float32))

    def _best_shape(self, cover: Float32Array) -> tuple[str, float]:
        """Return the class whose ideal shape overlaps ``cover`` [h,w] most, and a score; `unknown` if that is too little."""
        (x, y), (spread_x, spread_y) = _moments(cover)
        if max(spread_x, spread_y) > self.max_aspect * min(spread_x, spread_y):
            return UNKNOWN_SHAPE, 1.0
        ideal = np.stack([draw(cover.shape, x, y, spread_x, spread_y) for draw in _IDEALS])
        overlaps = np.minimum(ideal, cover).sum((1, 2)) / np.maximum(ideal, cover).sum((1, 2))
        best = int(overlaps.argmax())
        if overlaps[best] < self.min_overlap[best]:
            return UNKNOWN_SHAPE, 1.0
        return SHAPES[best], 0.9 + 0.1 * float(overlaps[best])


class _Unmixed(NamedTuple):
    """Pixels [B,H,W,3] as mixtures of the background with one colour."""

    coverage: Float32Array  # [B,C,H,W], for each colour separately
    residual: Float32Array  # [B,H,W], distance from the best mixture
    masks: Mask  # [B,C+1,H,W], at least half covered by the best colour; last, pixels of no palette colour


def _unmix(pixels: Float32Array, off_palette: float) -> _Unmixed:
    background = np.asarray(BACKGROUND, np.float32) / 255
    rays = np.asarray(list(PALETTE.values()), np.float32) / 255 - background  # [C,3]
    count, height, width = pixels.shape[:3]
    coverage = np.empty((count, height, width, len(rays)), np.float32)
    residual = np.empty((count, height, width), np.float32)
    masks = np.empty((count, len(rays) + 1, height, width), bool)
    rows = max(1, BLOCK // (count * width))
    for start in range(0, height, rows):  # in blocks, for the memory of the intermediate results
        block = slice(start, start + rows)
        offset = pixels[:, block] - background
        mixture = np.clip(offset @ (rays / (rays**2).sum(1, keepdims=True)).T, 0.0, 1.0)  # [B,H,W,C]
        # ‖offset − a·ray‖² = ‖offset‖² − 2a·(offset·ray) + a²·‖ray‖², without a [B,H,W,C,3] array.
        squared = (offset**2).sum(-1)[..., None] - 2 * mixture * (offset @ rays.T) + mixture**2 * (rays**2).sum(1)
        channel = squared.argmin(-1)
        coverage[:, block], residual[:, block] = mixture, np.sqrt(np.maximum(squared.min(-1), 0.0))
        half = np.take_along_axis(mixture, channel[..., None], -1)[..., 0] >= 0.5
        odd = residual[:, block] > off_palette
        channel = np.where(odd, len(PALETTE), channel)
        palette = np.arange(len(PALETTE) + 1)[:, None, None]
        masks[:, :, block] = (channel[:, None] == palette) & (half | odd)[:, None]
    return _Unmixed(coverage.transpose(0, 3, 1, 2), residual, masks)


def _label_blobs(masks: Mask, least: float) -> NDArray[np.int32]:
    """Number the 4-connected regions of masks [B,H,W] that have at least ``least`` pixels. A region never spans images."""
    structure = np.zeros((3, 3, 3), dtype=bool)
    structure[1] = ndimage.generate_binary_structure(2, 1)
    labels: NDArray[np.int32] = ndimage.label(masks, structure)[0]
    large = np.bincount(labels.ravel()) >= least
    large[0] = False  # the pixels of no region
    blobs: NDArray[np.int32] = (np.cumsum(large, dtype=np.int32) * large)[labels]
    return blobs


def _grown(window: slice, size: int) -> slice:
    """Return the window with a margin of two pixels, for the anti-aliased rim."""
    return slice(max(window.start - 2, 0), min(window.stop + 2, size))


def _moments(cover: Float32Array) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return centre (x, y) and standard deviations of the coverage [h,w] as a density, in pixels."""
    total = float(cover.sum())
    across, down = cover.sum(0) / total, cover.sum(1) / total
    columns, rows = np.arange(len(across)), np.arange(len(down))
    x, y = float(across @ columns), float(down @ rows)
    # A pixel is a unit square, not a point: 1/12 is the square's variance.
    spread_x = float(across @ (columns - x) ** 2) + 1 / 12
    spread_y = float(down @ (rows - y) ** 2) + 1 / 12
    return (x, y), (spread_x**0.5, spread_y**0.5)


def _grid(shape: tuple[int, ...], x: float, y: float) -> tuple[Float32Array, Float32Array]:
    """Return the distances of pixels from (x, y) to the right and down."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (columns - x).astype(np.float32), (rows - y).astype(np.float32)


def _circle(shape: tuple[int, ...], x: float, y: float, spread_x: float, spread_y: float) -> Float32Array:
    """Return the coverage of the ellipse with these moments. Along an axis a disc of radius r has variance r²/4."""
    right, down = _grid(shape, x, y)
    radius_x, radius_y = 2 * spread_x, 2 * spread_y
    inward = (1 - np.sqrt((right / radius_x) ** 2 + (down / radius_y) ** 2)) * (radius_x * radius_y) ** 0.5
    coverage: Float32Array = np.clip(inward + 0.5, 0.0, 1.0)
    return coverage


def _square(shape: tuple[int, ...], x: float, y: float, spread_x: float, spread_y: float) -> Float32Array:
    """Return the coverage of the rectangle with these moments. An interval of length w has variance w²/12."""
    right, down = _grid(shape, x, y)
    half_x, half_y = 3**0.5 * spread_x, 3**0.5 * spread_y
    across: Float32Array = np.clip(half_x - np.abs(right) + 0.5, 0, 1)
    return across * np.clip(half_y - np.abs(down) + 0.5, 0, 1)


def _triangle(shape: tuple[int, ...], x: float, y: float, spread_x: float, spread_y: float) -> Float32Array:
    """Return the coverage of the upright triangle with these moments: variances w²/24 and h²/18, centre at 2h/3."""
    right, down = _grid(shape, x, y)
    width, height = 24**0.5 * spread_x, 18**0.5 * spread_y
    below_apex = down + height * 2 / 3
    slant = (below_apex * width / (2 * height) - np.abs(right)) / (1 + (width / (2 * height)) ** 2) ** 0.5
    coverage: Float32Array = np.clip(slant + 0.5, 0.0, 1.0) * np.clip(height / 3 - down + 0.5, 0.0, 1.0)
    return coverage


_IDEALS = (_circle, _square, _triangle)  # in the order of SHAPES
_NEIGHBOURS = np.ones((3, 3), dtype=bool)
