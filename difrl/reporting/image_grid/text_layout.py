"""Font, line breaking and colours of sample sheets."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from PIL import ImageFont

Colour = tuple[int, int, int]

PAGE: Colour = (255, 255, 255)
INK: Colour = (29, 29, 31)
MUTED: Colour = (112, 112, 118)
HAIRLINE: Colour = (218, 218, 214)


@functools.cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans from the data folder of matplotlib, which is installed with difrl."""
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)


def line_height(face: ImageFont.FreeTypeFont) -> int:
    """Return the distance between two lines, in pixels."""
    ascent, descent = face.getmetrics()
    return ascent + descent + 1


def block_height(lines: Sequence[str], face: ImageFont.FreeTypeFont) -> int:
    """Return the height of several lines, in pixels."""
    return len(lines) * line_height(face)


def wrap(text: str, face: ImageFont.FreeTypeFont, width: float, most: int) -> list[str]:
    """Break a text at spaces into at most `most` lines of `width` pixels. Text that does not fit ends in an ellipsis.

    A word wider than the line is cut, to keep the layout.
    """
    lines: list[str] = []
    for word in text.split():
        candidate = f"{lines[-1]} {word}" if lines else word
        if lines and face.getlength(candidate) <= width:
            lines[-1] = candidate
        else:
            lines.append(word)
    kept = lines[:most] or [""]
    if len(lines) > most:
        kept[-1] += "…"
    return [_cut(line, face, width) for line in kept]


def _cut(line: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    if face.getlength(line) <= width:
        return line
    line = line.rstrip("…")
    while line and face.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"
