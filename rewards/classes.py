"""Names of object classes in GenEval's metadata and in the checkpoints of detectors.

GenEval's 80 classes are COCO's. Three are renamed so that a prompt can use them ("computer mouse" for mouse,
"tv remote" for remote, "computer keyboard" for keyboard). Checkpoints spell COCO's classes in two ways: as COCO does
(DETR, Mask2Former, MM-Grounding-DINO), and with the words of Pascal VOC (RT-DETR, YOLO: "motorbike", "aeroplane",
"sofa", "pottedplant", "diningtable", "tvmonitor"). Two names mean one class if they are equal without case, blanks and
punctuation, or if they are in one row of `SYNONYMS`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

Clause = Mapping[str, Any]
"""A clause of GenEval's metadata: class, count, and optionally color and position."""

ANY = "*"  # in an exclude clause: objects of every class together

SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("airplane", "aeroplane"),
    ("cell phone", "mobile phone"),
    ("computer keyboard", "keyboard"),
    ("computer mouse", "mouse"),
    ("couch", "sofa"),
    ("donut", "doughnut"),
    ("hair drier", "hair dryer"),
    ("motorcycle", "motorbike"),
    ("tv", "tv monitor", "television"),
    ("tv remote", "remote", "remote control"),
)


def key(name: str) -> str:
    """Return the normal form of a class name, equal for all its spellings."""
    bare = _bare(name)
    return _FIRST.get(bare, bare)


class UnknownClass(ValueError):
    """The metadata of an image contain a class that the detector cannot report; ``image`` is its index."""

    def __init__(self, image: int, problem: str) -> None:
        super().__init__(problem)
        self.image = image


def check_classes(wanted: Sequence[Collection[str]], classes: Collection[str], detector: str) -> None:
    """Raise UnknownClass if the metadata of an image contain a class that is none of the detector's ``classes``."""
    keys = {key(name) for name in classes}
    for image, name in [(image, name) for image, names in enumerate(wanted) for name in sorted(set(names) - {ANY})]:
        if key(name) not in keys:
            near = difflib.get_close_matches(name, classes, 3)
            hint = f"; its nearest: {', '.join(map(repr, near))}" if near else ""
            raise UnknownClass(
                image,
                f"the metadata name the class {name!r}, which is none of the {len(classes)} classes of {detector}{hint}. "
                "Choose a detector that has this class (a zero-shot one takes any name), or leave these prompts out",
            )


def _bare(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


_FIRST = {_bare(name): _bare(row[0]) for row in SYNONYMS for name in row}
