"""The shapes task: 32x32 drawings of coloured shapes, the prompts that describe them, and the split into train and eval.

A prompt comes with metadata in GenEval's published format (arXiv:2310.11513), so the same
reward scores these drawings and photographs. All six GenEval tags are present:

    single_object  a circle                            3 prompts
    colors         a red circle                       12
    counting       two red circles                    24
    two_object     a circle and a square               6
    color_attr     a red circle and a blue square    108
    position       a red circle left of a blue square 432

All prompts about the same pair of objects are on one side of the split, whatever the relation between the objects. So an
evaluation prompt describes a combination that reinforcement learning has never been rewarded for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rewards.boxes import RELATIONS
from rewards.detectors import BACKGROUND, COLORS, PALETTE

Split = Literal["train", "eval", "all"]

CLASSES = ("circle", "square", "triangle")
COUNT_WORDS = {"two": 2, "three": 3}
SIZE = 32
"""Width and height of a drawing in pixels."""

TAG_SHARES = {
    "single_object": 0.05,
    "colors": 0.10,
    "counting": 0.20,
    "two_object": 0.05,
    "color_attr": 0.25,
    "position": 0.35,
}
"""Share of each tag in pretraining. Most prompts are about relations, and those are the hardest to learn."""


@dataclass(frozen=True)
class ShapesPrompt:
    """A prompt with GenEval's metadata, and the combination of objects that decides its side of the split."""

    text: str
    metadata: Mapping[str, Any]
    combination: tuple[str, ...]


def _prompt(
    tag: str, text: str, include: list[dict[str, Any]], combination: Sequence[str], **extra: Any
) -> ShapesPrompt:
    metadata = {"tag": tag, "include": include, **extra, "prompt": text}
    return ShapesPrompt(text, metadata, tuple(sorted(combination)))


def _all_prompts() -> list[ShapesPrompt]:
    prompts = [_prompt("single_object", f"a {s}", [{"class": s, "count": 1}], [s]) for s in CLASSES]
    for color, shape in itertools.product(COLORS, CLASSES):
        name = f"{color} {shape}"
        prompts.append(_prompt("colors", f"a {name}", [{"class": shape, "color": color, "count": 1}], [name]))
        for word, n in COUNT_WORDS.items():
            include = [{"class": shape, "color": color, "count": n}]
            exclude = [{"class": shape, "count": n + 1}]
            prompts.append(_prompt("counting", f"{word} {name}s", include, [name, word], exclude=exclude))
    for first, second in itertools.permutations(CLASSES, 2):
        include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
        prompts.append(_prompt("two_object", f"a {first} and a {second}", include, [first, second]))
    objects = list(itertools.product(COLORS, CLASSES))
    for (color_a, a), (color_b, b) in itertools.permutations(objects, 2):
        if color_a == color_b:
            continue
        names = [f"{color_a} {a}", f"{color_b} {b}"]
        object_a = {"class": a, "color": color_a, "count": 1}
        object_b = {"class": b, "color": color_b, "count": 1}
        prompts.append(_prompt("color_attr", f"a {names[0]} and a {names[1]}", [object_a, object_b], names))
        for relation in RELATIONS:
            # GenEval puts the relation on the second entry, relative to the first, so the reference object comes first.
            include = [object_b, {**object_a, "position": [relation, 0]}]
            prompts.append(_prompt("position", f"a {names[0]} {relation} a {names[1]}", include, names))
    return prompts


def _evaluation_combinations(prompts: Sequence[ShapesPrompt]) -> set[tuple[str, ...]]:
    """Return a fixed quarter of the combinations of each kind, drawn with a seed of its own."""
    rng = np.random.default_rng(20240721)
    held_out: set[tuple[str, ...]] = set()
    for tag in ("colors", "counting", "two_object", "color_attr"):
        combinations = sorted({p.combination for p in prompts if p.metadata["tag"] == tag})
        rows = rng.choice(len(combinations), size=max(1, len(combinations) // 4), replace=False)
        held_out.update(combinations[i] for i in rows)
    return held_out


ALL_PROMPTS = tuple(_all_prompts())
EVALUATION_COMBINATIONS = frozenset(_evaluation_combinations(ALL_PROMPTS))


def prompts(split: Split = "all") -> list[ShapesPrompt]:
    """Return the prompts of one side of the split, in a fixed order."""
    if split == "all":
        return list(ALL_PROMPTS)
    if split not in ("train", "eval"):
        raise ValueError(f"unknown split {split!r} of the shapes task; expected train, eval or all")
    return [p for p in ALL_PROMPTS if (p.combination in EVALUATION_COMBINATIONS) == (split == "eval")]


@dataclass(frozen=True)
class Figure:
    """One drawn object: its class, its colour, its centre and its radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def _related(a: tuple[float, float], b: tuple[float, float], relation: str) -> bool:
    """Return whether a is in the relation to b beyond doubt: the offset along its axis is 1.5 times that across."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = -1.0 if relation in ("left of", "above") else 1.0
    return along * sign > 1.5 * abs(across)


def _place(count: int, relation: str | None, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draw centres and radii of figures that lie inside the drawing and at least a pixel and a half apart."""
    while True:
        largest = {1: 7.0, 2: 6.0}.get(count, 5.2)
        radii = rng.uniform(4.0, largest, size=count)
        centres = [tuple(rng.uniform(r + 1.5, SIZE - r - 1.5, size=2)) for r in radii]
        apart = all(
            np.hypot(centres[i][0] - centres[j][0], centres[i][1] - centres[j][1]) > 1.25 * (radii[i] + radii[j]) + 1.5
            for i, j in itertools.combinations(range(count), 2)
        )
        if apart and (relation is None or _related(centres[1], centres[0], relation)):
            return [(x, y, r) for (x, y), r in zip(centres, radii, strict=True)]


def draw_scene(metadata: Mapping[str, Any], rng: np.random.Generator) -> list[Figure]:
    """Draw figures that satisfy the metadata. A colour that the metadata leave open is random."""
    objects = [(o["class"], o.get("color")) for o in metadata["include"] for _ in range(o["count"])]
    relation = next((o["position"][0] for o in metadata["include"] if "position" in o), None)
    places = _place(len(objects), relation, rng)
    colors = [color or COLORS[rng.integers(len(COLORS))] for _, color in objects]
    return [Figure(s, c, *place) for (s, _), c, place in zip(objects, colors, places, strict=True)]


def _signed_distance(figure: Figure, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Return the distance in pixels to the outline, negative inside. For the triangle: to the line of its nearest side."""
    dx, dy, r = px - figure.x, py - figure.y, figure.radius
    if figure.shape == "circle":
        return np.hypot(dx, dy) - r
    if figure.shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * r
    # An isosceles triangle pointing up: apex (0, -r), base from (-r, 0.85 r) to (r, 0.85 r).
    height = 1.85 * r
    norm = np.hypot(height, r)
    side = (height * np.abs(dx) - r * (dy + r)) / norm
    distance: np.ndarray = np.maximum(side, dy - 0.85 * r)
    return distance


def render_figures(figures: Sequence[Figure]) -> np.ndarray:
    """Render figures on the background with anti-aliased edges: float32 [3, 32, 32] in [0, 1]."""
    py, px = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    image = np.broadcast_to(np.array(BACKGROUND, dtype=np.float32)[:, None, None] / 255.0, (3, SIZE, SIZE)).copy()
    for figure in figures:
        coverage = np.clip(0.5 - _signed_distance(figure, px, py), 0.0, 1.0)
        color = np.array(PALETTE[figure.color], dtype=np.float32)[:, None, None] / 255.0
        image = image + coverage[None] * (color - image)
    return image.astype(np.float32)


def draw_images(metadata: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> Tensor:
    """Draw images that satisfy the metadata: float32 [B, 3, 32, 32] in [0, 1]."""
    return torch.from_numpy(np.stack([render_figures(draw_scene(m, rng)) for m in metadata]))


def sample_prompts(count: int, rng: np.random.Generator) -> list[ShapesPrompt]:
    """Draw prompts of both sides of the split, with the tag shares of pretraining."""
    by_tag = {tag: [p for p in ALL_PROMPTS if p.metadata["tag"] == tag] for tag in TAG_SHARES}
    tags = rng.choice(list(TAG_SHARES), size=count, p=list(TAG_SHARES.values()))
    return [by_tag[tag][rng.integers(len(by_tag[tag]))] for tag in tags]


def satisfies(metadata: Mapping[str, Any], figures: Sequence[Figure]) -> bool:
    """Return whether the figures satisfy the metadata: the exact label that the judge is trained on."""
    matching = [_find_matching(clause, figures) for clause in metadata["include"]]
    enough = all(len(f) >= o["count"] for f, o in zip(matching, metadata["include"], strict=True))
    excess = any(len(_find_matching(o, figures)) >= o["count"] for o in metadata.get("exclude", ()))
    placed = all(_is_placed(o, f, matching) for o, f in zip(metadata["include"], matching, strict=True))
    return enough and not excess and placed


def _find_matching(clause: Mapping[str, Any], figures: Sequence[Figure]) -> list[Figure]:
    color = clause.get("color")
    return [f for f in figures if f.shape == clause["class"] and color in (None, f.color)]


def _is_placed(clause: Mapping[str, Any], figures: Sequence[Figure], matching: Sequence[Sequence[Figure]]) -> bool:
    """Return whether some of the clause's figures is in the relation that the clause states, if any."""
    if "position" not in clause:
        return True
    relation, other = clause["position"]
    pairs = itertools.product(figures, matching[other])
    return any(_related((a.x, a.y), (b.x, b.y), relation) for a, b in pairs if a is not b)
