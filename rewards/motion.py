"""Motion of the shapes task: is the object of the prompt in every frame, and does it move in the prompt's direction?

Metadata have GenEval's `include` with a single clause of `class` and optionally `color`, and `motion`: left, right, up or
down. Between successive frames the centre of the object's box moves by (along, across), along and across the direction.
The move is right if it is far enough and clearly in the direction:

    along ≥ least · width of the frame   and   along > 1.5 |across|
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from rewards.base import Metadata, MetadataError, Scores, WithoutDevice, check_videos
from rewards.detectors import Detection, ShapesDetector

DIRECTIONS: Mapping[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Steps to the right and down."""


class Motion(WithoutDevice):
    """Motion of a drawn shape: the share of moves between frames that show the shape and go in the prompt's direction.

    partial: false for 1 if all moves are right, else 0. least: shortest right move, as a share of the width. overlap: least
    overlap of an object with the ideal shape of its class, in [0,1]; videos are blurred more than pictures, for which the
    detector expects 0.82 to 0.87. A row whose metadata have no `motion` is invalid. A frame without the object, with a second
    one or with anything else makes the moves before and after it wrong.
    """

    name = "motion"
    needs: tuple[str, ...] = ("videos", "metadata")

    def __init__(self, *, partial: bool = True, least: float = 0.02, overlap: float = 0.7) -> None:
        if least < 0 or not 0 <= overlap <= 1:
            raise ValueError(f"reward 'motion': least is {least} and overlap {overlap}; expected 0 or more, and 0 to 1")
        self.partial, self.least = partial, least
        self.detector = ShapesDetector(min_overlap=(overlap, overlap, overlap))

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score videos [B,F,3,H,W] in [0,1], of two frames or more."""
        videos = check_videos(samples, self.name)
        count, frames, *_, width = videos.shape
        if frames < 2:
            raise ValueError("a motion needs two frames or more, found videos of 1")
        facts = [
            _read_metadata(each, row, prompt) for row, (each, prompt) in enumerate(zip(metadata, prompts, strict=True))
        ]
        found = self.detector(videos.flatten(0, 1))
        values: list[float | None] = []
        for row in range(count):
            known = facts[row]
            values.append(
                None if known is None else self._score(found[row * frames : (row + 1) * frames], known, width)
            )
        return Scores.from_list(values).to(samples.device)

    def _score(self, found: Sequence[Sequence[Detection]], facts: tuple[Mapping[str, Any], str], width: int) -> float:
        """Return the score of a video, given the detections of each frame."""
        clause, direction = facts
        right, down = DIRECTIONS[direction]
        centres = [_find_centre(objects, clause) for objects in found]
        moves = list[bool]()
        for one, other in pairwise(centres):
            if one is None or other is None:
                moves.append(False)
                continue
            dx, dy = other[0] - one[0], other[1] - one[1]
            along, across = dx * right + dy * down, dx * down + dy * right
            moves.append(along >= self.least * width and along > 1.5 * abs(across))
        return sum(moves) / len(moves) if self.partial else float(all(moves))


def _find_centre(objects: Sequence[Detection], clause: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the centre of the only object of a frame; None if it is not the clause's, or not the only one."""
    if len(objects) != 1:
        return None
    (item,) = objects
    if item.label != clause["class"] or clause.get("color", item.color) != item.color:
        return None
    left, top, right, bottom = item.box
    return (left + right) / 2, (top + bottom) / 2


def _read_metadata(metadata: Mapping[str, Any], row: int, prompt: str) -> tuple[Mapping[str, Any], str] | None:
    """Return the clause and the direction of a row; None without a motion."""
    if "motion" not in metadata:
        return None
    direction, include = metadata["motion"], metadata.get("include")
    if direction not in DIRECTIONS:
        problem = f"'motion' of the metadata is {direction!r}, expected one of {', '.join(DIRECTIONS)}"
        raise MetadataError(Motion.name, problem, row, prompt)
    match include:
        case [{"class": str()} as clause]:
            return clause, direction
    problem = f"'include' of the metadata is {include!r}, expected one clause with a class, the object that moves"
    raise MetadataError(Motion.name, problem, row, prompt)
