"""Drawings by PIL, painted at eight times the size and averaged down, so that their edges are anti-aliased."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from rewards import BACKGROUND, PALETTE

SCALE = 8
Shape = tuple[str, str, float, float, float]  # class, colour, left, top, width
Draw = Callable[[Sequence[Shape]], Tensor]


def _paint(picture: ImageDraw.ImageDraw, shape: Shape, scale: float) -> None:
    label, color, left, top, width = shape
    x0, y0, x1, y1 = (scale * value for value in (left, top, left + width, top + width))
    fill = PALETTE[color]
    if label == "circle":
        picture.ellipse((x0, y0, x1 - 1, y1 - 1), fill=fill)
    elif label == "square":
        picture.rectangle((x0, y0, x1 - 1, y1 - 1), fill=fill)
    else:
        picture.polygon([(x0, y1), (x1, y1), ((x0 + x1) / 2, y0)], fill=fill)


@pytest.fixture(scope="session")
def paint() -> Callable[..., Tensor]:
    """A function that returns an image [3,size,size], given a function that paints on a canvas of 8·size pixels."""

    def make(painter: Callable[[ImageDraw.ImageDraw], object], size: int = 32) -> Tensor:
        canvas = Image.new("RGB", (size * SCALE, size * SCALE), BACKGROUND)
        painter(ImageDraw.Draw(canvas))
        pixels = np.array(canvas.resize((size, size), Image.Resampling.BOX))
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255

    return make


@pytest.fixture(scope="session")
def draw(paint: Callable[..., Tensor]) -> Draw:
    """A function that returns an image [3,32,32] of shapes (class, colour, left, top, width)."""
    return lambda shapes: paint(lambda canvas: [_paint(canvas, shape, SCALE) for shape in shapes])


@pytest.fixture(scope="session")
def draw_large(paint: Callable[..., Tensor]) -> Draw:
    """The same with 96 pixels, and shapes three times as large."""
    return lambda shapes: paint(lambda canvas: [_paint(canvas, shape, 3 * SCALE) for shape in shapes], 96)
