"""Two kinds of sample sheet: `grid` shows one set of samples, `compare` shows several sets side by side.

Both have one prompt a row. The font is DejaVu Sans from matplotlib, so a sheet looks the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageDraw

from difrl.reporting.image_grid.badges import badge, colour_scale_ends, mean_score
from difrl.reporting.image_grid.text_layout import (
    HAIRLINE,
    INK,
    MUTED,
    PAGE,
    block_height,
    font,
    line_height,
    wrap,
)
from difrl.reporting.number_format import ScoreTable

SMALLEST_TILE = 120  # pixels: a smaller image would be dwarfed by its caption
LARGEST_TILE = 384  # pixels: a sheet of 1024-pixel images would not open in most viewers
NARROWEST_CAPTION = 170  # pixels
NARROWEST_HEADER = 90  # pixels
MOST_LINES = 4  # of a caption below an image


@dataclass(frozen=True)
class TileColumn:
    """One labelled set of samples: tiles[row][sample], and scores of the same shape, None if nothing was scored."""

    label: str
    tiles: list[list[Image.Image]]
    scores: ScoreTable | None = None
    is_input: bool = False
    """True for the input images of prompts, which may be smaller than a tile."""

    @property
    def most(self) -> int:
        return max(len(row) for row in self.tiles)


@dataclass(frozen=True)
class Lengths:
    """Lengths of a sheet in pixels, derived from the size of a tile."""

    width: int
    height: int
    scored: bool

    @property
    def text(self) -> int:
        return max(13, min(26, min(self.width, self.height) // 9))

    @property
    def gap(self) -> int:
        return max(6, min(self.width, self.height) // 20)

    @property
    def margin(self) -> int:
        return max(16, min(self.width, self.height) // 7)

    @property
    def badge(self) -> int:
        return round(self.text * 1.8) if self.scored else 0

    @property
    def pitch(self) -> int:
        """Distance between rows. A badge must be closer to its own tile than to the tile below."""
        return self.height + self.badge + (self.gap * 3 // 2 if self.scored else self.gap)

    def column(self, tiles: int) -> int:
        return tiles * (self.width + self.gap) - self.gap


def grid(
    images: torch.Tensor,
    captions: Sequence[str],
    columns: int,
    scores: ScoreTable | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Return a sheet of samples [B,3,H,W] in [0,1] with `columns` images a row.

    `captions` has one entry an image, or one a row. A caption that holds for a whole row is drawn at its left; otherwise every
    image has its own below it. `scores` has one list a row; None or NaN marks an image that could not be scored. `scale` is
    an integer enlargement by nearest neighbour; None selects one that makes tiles legible, and shrinks very large images.
    Raise ValueError if the numbers of images, captions, columns and scores do not fit, or if images are not finite.
    """
    _check_images(images, 4)
    rows = math.ceil(len(images) / columns) if columns > 0 else 0
    if columns < 1 or len(captions) not in (len(images), rows):
        raise ValueError(
            f"grid: {len(captions)} captions for {len(images)} images in {columns} columns; "
            f"give one caption an image ({len(images)}) or one a row ({rows}), and at least one column"
        )
    _check_scores(scores, rows)
    starts = range(0, len(images), columns)
    tiles = _tiles(images, scale)
    lines = [tiles[start : start + columns] for start in starts]
    if len(captions) == rows:
        return _sheet([TileColumn("", lines, scores)], captions)
    named = [captions[start : start + columns] for start in starts]
    if columns > 1 and all(len(set(line)) == 1 for line in named):
        return _sheet([TileColumn("", lines, scores)], [line[0] for line in named])
    return _captioned(TileColumn("", lines, scores), named)


def compare(
    rows_by_label: Mapping[str, torch.Tensor],
    prompts: Sequence[str],
    scores: Mapping[str, ScoreTable] | None = None,
    scale: int | None = None,
    inputs: Sequence[Image.Image] = (),
) -> Image.Image:
    """Return several sets of samples side by side: one column a label, in the order of the mapping, and one row a prompt.

    `rows_by_label` maps a label to images [P,3,H,W], or [P,n,3,H,W] for n samples a prompt; `scores` maps it to P lists of
    n values. `inputs` has the prompts' input images, of any sizes, which form the first column, or is empty. Raise ValueError
    if the numbers of prompts, images and scores do not fit, or if images are not finite.
    """
    if not rows_by_label:
        raise ValueError("compare: no columns were given; expected at least one label with its images")
    columns = []
    for label, images in rows_by_label.items():
        nested = images.unsqueeze(1) if images.dim() == 4 else images
        _check_images(nested, 5)
        if len(nested) != len(prompts):
            raise ValueError(f"compare: column {label!r} has {len(nested)} rows for {len(prompts)} prompts")
        own = scores.get(label) if scores else None
        _check_scores(own, len(prompts))
        columns.append(TileColumn(label, [_tiles(row, scale) for row in nested], own))
    if inputs:
        if len(inputs) != len(prompts):
            raise ValueError(f"compare: {len(inputs)} input images for {len(prompts)} prompts")
        size = columns[0].tiles[0][0].size
        named = [replace(column, label=column.label or "output") for column in columns]
        columns = [TileColumn("input", [[_fit(image, size)] for image in inputs], is_input=True), *named]
    return _sheet(columns, prompts)


def _check_images(images: torch.Tensor, dimensions: int) -> None:
    if images.dim() != dimensions or images.shape[-3] != 3 or 0 in images.shape:
        shape = tuple(images.shape)
        raise ValueError(f"images have shape {shape}; expected [...,3,H,W] with no empty dimension")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images hold NaN or infinite values; check how they were decoded")


def _check_scores(scores: ScoreTable | None, rows: int) -> None:
    if scores is not None and len(scores) != rows:
        raise ValueError(f"{len(scores)} lists of scores for {rows} rows of images; expected one a row")


def _tiles(images: torch.Tensor, scale: int | None) -> list[Image.Image]:
    """Return images [B,3,H,W] in [0,1] as PIL images, enlarged by an integer factor or shrunk to LARGEST_TILE."""
    height, width = images.shape[-2:]
    levels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    pictures = [Image.fromarray(level) for level in levels.permute(0, 2, 3, 1).cpu().numpy()]
    factor = scale or max(1, math.ceil(SMALLEST_TILE / min(height, width)))
    if factor > 1:
        return [one.resize((width * factor, height * factor), Image.Resampling.NEAREST) for one in pictures]
    if scale is None and max(height, width) > LARGEST_TILE:
        shrink = LARGEST_TILE / max(height, width)
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        return [one.resize(size, Image.Resampling.LANCZOS) for one in pictures]
    return pictures


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image as large as a tile of this size allows. Pixel art stays sharp."""
    factor = min(tile / side for tile, side in zip(size, image.size, strict=True))
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS)


def _sheet(columns: Sequence[TileColumn], prompts: Sequence[str]) -> Image.Image:
    """Draw prompts at the left, then the columns, with more room between columns than between samples of one column."""
    size = columns[-1].tiles[0][0].size
    lengths = Lengths(*size, scored=any(column.scores is not None for column in columns))
    gap, margin, body = lengths.gap, lengths.margin, font(lengths.text)
    room = max(2, lengths.pitch // line_height(body) - 2)
    captions = [wrap(one, body, max(1.5 * lengths.width, NARROWEST_CAPTION), room) for one in prompts]
    longest = max(body.getlength(line) for lines in captions for line in lines)
    left = margin + (math.ceil(longest + 2.5 * gap) if longest else 0)
    between = 3 * gap if any(column.most > 1 for column in columns) else gap
    header = lengths.text * (3 if lengths.scored else 2) if any(column.label for column in columns) else 0
    width = sum(lengths.column(column.most) + between for column in columns) - between
    height = header + lengths.pitch * len(prompts) - gap
    sheet = Image.new("RGB", (left + width + margin, height + 2 * margin), PAGE)

    top = margin + header
    sets = [column for column in columns if not column.is_input]
    for index, lines in enumerate(captions):
        alone = sets[0].scores if len(sets) == 1 else None
        mean = mean_score([alone[index]]) if alone is not None else None
        _caption(sheet, lines, mean, (margin, top + index * lengths.pitch), lengths)
    x = left
    for column in columns:
        _header(sheet, column, (x, margin), lengths)
        spread = colour_scale_ends([one.scores for one in columns if one.scores is not None])
        for index in range(len(prompts)):
            _row(sheet, column, index, spread, (x, top + index * lengths.pitch), lengths)
        x += lengths.column(column.most) + between
    return sheet


def _caption(sheet: Image.Image, lines: list[str], mean: float | None, at: tuple[int, int], lengths: Lengths) -> None:
    """Draw a prompt, vertically centred on its row of tiles, and the mean score of the row below it."""
    draw, body, small = ImageDraw.Draw(sheet), font(lengths.text), font(lengths.text - 2)
    x, y = at
    extra = line_height(small) + 3 if mean is not None else 0
    y += max(0, (lengths.height - block_height(lines, body) - extra) // 2)
    for line in lines:
        draw.text((x, y), line, font=body, fill=INK)
        y += line_height(body)
    if mean is not None:
        draw.text((x, y + 3), f"mean {mean:.2f}", font=small, fill=MUTED)


def _header(sheet: Image.Image, column: TileColumn, at: tuple[int, int], lengths: Lengths) -> None:
    if not column.label:
        return
    draw, bold, small = ImageDraw.Draw(sheet), font(lengths.text, bold=True), font(lengths.text - 2)
    width = lengths.column(column.most)
    (label,) = wrap(column.label, bold, max(width, NARROWEST_HEADER), 1)
    x, y = at[0] + width / 2, at[1]
    draw.text((x, y), label, font=bold, fill=INK, anchor="mt")
    mean = mean_score(column.scores or [])
    if mean is not None:
        lower = y + lengths.text * 1.5
        draw.text((x, lower), f"mean {mean:.2f}", font=small, fill=MUTED, anchor="mt")


def _row(
    sheet: Image.Image,
    column: TileColumn,
    index: int,
    spread: tuple[float, float],
    at: tuple[int, int],
    lengths: Lengths,
) -> None:
    """Draw tiles, each with its score below, and with a hairline around it that shows the edge of a pale image."""
    draw = ImageDraw.Draw(sheet)
    values = list(column.scores[index]) if column.scores is not None else []
    x, y = at
    for position, tile in enumerate(column.tiles[index]):
        left, upper = x + (lengths.width - tile.width) // 2, y + (lengths.height - tile.height) // 2
        sheet.paste(tile, (left, upper))
        draw.rectangle((left - 1, upper - 1, left + tile.width, upper + tile.height), outline=HAIRLINE)
        if position < len(values):
            label = badge(values[position], spread, lengths.text - 1)
            lower = y + tile.height + lengths.text // 4
            sheet.paste(label, (x + (tile.width - label.width) // 2, lower), label)
        x += lengths.width + lengths.gap


def _captioned(column: TileColumn, named: Sequence[Sequence[str]]) -> Image.Image:
    """Draw a sheet on which every image has its own caption below it."""
    lengths = Lengths(*column.tiles[0][0].size, scored=column.scores is not None)
    body, margin, between = font(lengths.text - 1), lengths.margin, 2 * lengths.gap
    wrapped = [[wrap(caption, body, lengths.width, MOST_LINES) for caption in row] for row in named]
    under = lengths.height + lengths.badge + lengths.gap // 2
    heights = [under + max(block_height(lines, body) for lines in row) for row in wrapped]
    width = column.most * (lengths.width + between) - between
    height = sum(heights) + between * (len(heights) - 1)
    sheet = Image.new("RGB", (width + 2 * margin, height + 2 * margin), PAGE)
    draw, y = ImageDraw.Draw(sheet), margin
    spread = colour_scale_ends([column.scores] if column.scores is not None else [])
    for index, row in enumerate(wrapped):
        for position, lines in enumerate(row):
            x = margin + position * (lengths.width + between)
            scores = [column.scores[index][position : position + 1]] if column.scores is not None else None
            one = TileColumn("", [[column.tiles[index][position]]], scores)
            _row(sheet, one, 0, spread, (x, y), lengths)
            for number, line in enumerate(lines):
                at = (x + lengths.width / 2, y + under + number * line_height(body))
                draw.text(at, line, font=body, fill=INK, anchor="ma")
        y += heights[index] + between
    return sheet
