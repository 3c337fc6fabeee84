"""Scores on a sample sheet, each a coloured label."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from difrl.reporting.image_grid.text_layout import MUTED, Colour, font
from difrl.reporting.number_format import ScoreTable

# (fill, text) from the lowest score to the highest: brown and teal can be told apart with common colour blindness.
SCALE: tuple[tuple[Colour, Colour], ...] = (
    ((250, 221, 205), (138, 56, 12)),
    ((240, 238, 228), (88, 80, 58)),
    ((200, 236, 226), (0, 92, 78)),
)
UNSCORED: tuple[Colour, Colour] = ((236, 236, 238), MUTED)
OVERSAMPLE = 4  # PIL does not anti-alias shapes, so a label is drawn this many times larger and reduced


def badge(value: float | None, spread: tuple[float, float], size: int) -> Image.Image:
    """Return the label of a score, coloured by its place in `spread`; None and NaN give a grey one."""
    if value is None or not math.isfinite(value):
        return pill("no score", size, None)
    low, high = spread
    return pill(score_text(value), size, (value - low) / (high - low) if high > low else 0.5)


def _finite(scores: ScoreTable) -> list[float]:
    return [value for row in scores for value in row if value is not None and math.isfinite(value)]


def mean_score(scores: ScoreTable) -> float | None:
    """Return the mean of the scores that are known, None without any."""
    values = _finite(scores)
    return sum(values) / len(values) if values else None


def colour_scale_ends(sets: Sequence[ScoreTable]) -> tuple[float, float]:
    """Return the ends of the colour scale: 0 and 1 if all scores lie between them, else the lowest and highest score."""
    values = [value for scores in sets for value in _finite(scores)]
    if not values or (min(values) >= 0 and max(values) <= 1):
        return 0.0, 1.0
    return min(values), max(values)


def score_text(value: float) -> str:
    """Return a score as short text: whole numbers without decimals."""
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"


def pill(text: str, size: int, level: float | None) -> Image.Image:
    """Return a rounded RGBA label. A level in [0, 1] selects its colour; None is grey."""
    fill, ink = UNSCORED if level is None else _shade(level)
    face = font(size)
    width, height = round(face.getlength(text)) + size, round(size * 1.5)
    mask = Image.new("L", (width * OVERSAMPLE, height * OVERSAMPLE), 0)
    edge = (0, 0, mask.width - 1, mask.height - 1)
    ImageDraw.Draw(mask).rounded_rectangle(edge, radius=mask.height // 2, fill=255)
    label = Image.new("RGBA", (width, height), (*fill, 0))
    label.putalpha(mask.resize((width, height), Image.Resampling.LANCZOS))
    ImageDraw.Draw(label).text((width / 2, height / 2), text, font=face, fill=(*ink, 255), anchor="mm")
    return label


def _shade(level: float) -> tuple[Colour, Colour]:
    place = min(1.0, max(0.0, level)) * (len(SCALE) - 1)
    below = min(int(place), len(SCALE) - 2)
    return (
        _mix(SCALE[below][0], SCALE[below + 1][0], place - below),
        _mix(SCALE[below][1], SCALE[below + 1][1], place - below),
    )


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue
