"""The task of moving shapes: videos of a coloured shape that moves, 5 frames of 32x32, and the prompts that describe them.

    a red circle moving left        4 colours, 3 shapes, 4 directions: 48 prompts

A prompt comes with metadata in GenEval's format, which hold in every frame, and with the direction under `motion`. All
objects and all directions occur on both sides of the split. A quarter of their combinations is in the evaluation set alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difrl.tasks.shapes import CLASSES, SIZE, Figure, ShapesPrompt, Split, render_figures
from rewards.detectors import COLORS
from rewards.motion import DIRECTIONS

FRAMES = 5
SLOWEST, FASTEST = 2.0, 4.0
"""Range of the speed, in pixels a frame."""


def _build_prompt(color: str, shape: str, direction: str) -> ShapesPrompt:
    text, include = f"a {color} {shape} moving {direction}", [{"class": shape, "color": color, "count": 1}]
    metadata = {"tag": "colors", "include": include, "motion": direction, "prompt": text}
    return ShapesPrompt(text, metadata, (f"{color} {shape}", direction))


ALL_PROMPTS = tuple(itertools.starmap(_build_prompt, itertools.product(COLORS, CLASSES, DIRECTIONS)))


def prompts(split: Split = "all") -> list[ShapesPrompt]:
    """Return the prompts of one side of the split, in a fixed order."""
    if split not in ("train", "eval", "all"):
        raise ValueError(f"unknown split {split!r} of the task of moving shapes; expected train, eval or all")
    # Of the four directions of each object one is held out, and of the next object the next one.
    held_out = [prompt for i, prompt in enumerate(ALL_PROMPTS) if i % 4 == i // 4 % 4]
    return [prompt for prompt in ALL_PROMPTS if split == "all" or (prompt in held_out) == (split == "eval")]


def draw_frames(metadata: Mapping[str, Any], rng: np.random.Generator) -> list[Figure]:
    """Draw a figure that satisfies the metadata, once for each frame. It moves at a constant speed and stays inside."""
    (clause,), (dx, dy) = metadata["include"], DIRECTIONS[metadata["motion"]]
    radius, speed = rng.uniform(4.0, 6.0), rng.uniform(SLOWEST, FASTEST)
    way = (FRAMES - 1) * speed
    # The first centre leaves room for the way that lies ahead.
    lows = [radius + 1.5 + way * max(0, -step) for step in (dx, dy)]
    highs = [SIZE - radius - 1.5 - way * max(0, step) for step in (dx, dy)]
    x, y = rng.uniform(lows, highs)
    moves = [(speed * frame * dx, speed * frame * dy) for frame in range(FRAMES)]
    return [Figure(clause["class"], clause["color"], x + right, y + down, radius) for right, down in moves]


def draw_videos(metadata: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> Tensor:
    """Draw videos that satisfy the metadata: float32 [B, 5, 3, 32, 32] in [0, 1]."""
    videos = [np.stack([render_figures([figure]) for figure in draw_frames(each, rng)]) for each in metadata]
    return torch.from_numpy(np.stack(videos))


def sample_prompts(count: int, rng: np.random.Generator) -> list[ShapesPrompt]:
    """Draw prompts of both sides of the split."""
    return [ALL_PROMPTS[i] for i in rng.integers(len(ALL_PROMPTS), size=count)]
