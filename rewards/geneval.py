"""GenEval: does the picture show the objects, counts, colours and positions of the prompt? (2310.11513)

Metadata is the published format: ``tag``, ``include`` and ``exclude`` lists of clauses, ``prompt``. A clause
of ``include`` asks for ``count`` objects of ``class``, if ``color`` is there of that colour, and if
``position`` is there (``["left of", k]``) so placed against the objects of clause k. A clause of ``exclude``
fails the picture when it has ``count`` or more objects of ``class``. The rules are those of the published
evaluation (evaluate_images.py of djghosh13/geneval): all clauses must hold; per class only the ``count`` most
confident objects are looked at; the confidence threshold is 0.3, and 0.9 for counting; at most 16 objects a
class.

What differs:

* Colours come from the detector, not from CLIP on a crop.
* Where two or more clauses name the *same* class ("a red circle and a blue circle", which no published prompt
  does) the published rule would ask the one most confident object to be both. Here each such clause takes its
  objects from those that no other clause has taken, the right colour first.
* ``position`` may point at a later clause. In an ``exclude`` clause the class ``"*"`` stands for objects of
  every class together and a ``color`` restricts what is counted; what the detector calls `unknown` (a blob
  that may be a botched third circle) counts for every class.
* ``exact=True`` adds that nothing may be in the picture but what ``include`` asks for.
* ``partial=True`` gives the mean over requirements instead of all-or-nothing. The requirements of an
  ``include`` clause are its count (found/count, at most 1), its colour (matching/count) and its position (0
  or 1); an ``exclude`` clause is one (0 or 1). It is 1 exactly where the strict score is 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewards.base import Metadata, RewardError, Scores, check_images
from rewards.detectors import UNKNOWN, Detection, Detector, ShapesDetector, TransformersDetector
from rewards.registry import register

RELATIONS = ("left of", "right of", "above", "below")
ANY = "*"
Clause = Mapping[str, Any]
Group = list[Detection]


@dataclass
class GenEval:
    """The GenEval reward over any detector: 1 or 0, or with ``partial`` the share of requirements met."""

    detector: Detector = field(default_factory=ShapesDetector)
    partial: bool = False
    exact: bool = False  # also fail pictures with more objects, of whatever class, than asked for
    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16  # a class
    max_overlap: float = 1.0  # boxes of a class that overlap more are one object; 1 keeps all, as published
    position_threshold: float = 0.1
    name: str = "geneval"
    needs: tuple[str, ...] = ("images", "metadata")

    def to(self, device: torch.device | str) -> GenEval:
        """Move the detector."""
        self.detector = self.detector.to(device)
        return self

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W]; a row whose metadata has neither include nor exclude is invalid."""
        valid = torch.tensor([bool(row.get("include") or row.get("exclude")) for row in metadata], dtype=torch.bool)
        images = check_images(samples, self.name)
        detections = self.detector(images)
        values = torch.zeros(len(metadata))
        for row in valid.nonzero().flatten().tolist():
            try:
                values[row] = self.judge(detections[row], metadata[row])
            except ValueError as error:
                raise RewardError(self.name, str(error), row, prompts[row]) from error
        return Scores(values.to(samples.device), valid.to(samples.device))

    def judge(self, detections: Sequence[Detection], metadata: Mapping[str, Any]) -> float:
        """The score of one image from what was detected in it."""
        shares = [share for _, share in self.requirements(detections, metadata)]
        return sum(shares) / len(shares) if self.partial else float(min(shares) >= 1.0)

    def requirements(self, detections: Sequence[Detection], metadata: Mapping[str, Any]) -> list[tuple[str, float]]:
        """Every requirement of the metadata in words, with the share of it that is met."""
        objects = self._kept(detections, metadata.get("tag"))
        include = _clauses(metadata, "include")
        exclude = _clauses(metadata, "exclude")
        for clause in (*include, *exclude):
            _check_colors(clause, objects)
        shares: list[tuple[str, float]] = []
        groups = _assign(include, objects)
        for clause, group in zip(include, groups, strict=True):
            shares += self._include(clause, group, groups)
        if self.exact:
            exclude.append({"class": ANY, "count": sum(clause["count"] for clause in include) + 1})
        for clause in exclude:
            found = sum(_counts(item, clause) for items in objects.values() for item in items)
            wanted = f"fewer than {clause['count']} {clause.get('color', '')} {clause['class']}"
            shares.append((" ".join(wanted.split()), float(found < clause["count"])))
        return shares

    def _kept(self, detections: Sequence[Detection], tag: str | None) -> dict[str, Group]:
        """Confident objects by class, the most confident first."""
        threshold = self.counting_threshold if tag == "counting" else self.threshold
        objects: dict[str, Group] = {}
        for item in sorted(detections, key=lambda item: -item.score):
            group = objects.setdefault(item.label, [])
            if item.score > threshold and len(group) < self.max_objects:
                group.append(item)
        return {label: _suppress(group, self.max_overlap) for label, group in objects.items()}

    def _include(self, clause: Clause, group: Group, groups: Sequence[Group]) -> list[tuple[str, float]]:
        count, words = clause["count"], f"{clause['count']} {clause['class']}"
        shares = [(words, len(group) / count)]
        complete = len(group) == count
        if "color" in clause:
            colored = sum(item.color == clause["color"] for item in group)
            shares.append((f"{words} {clause['color']}", colored / count))
            complete = complete and colored == count
        if "position" in clause:
            relation, target = clause["position"]
            placed = self._placed(clause, group, groups) and complete
            shares.append((f"{words} {relation} clause {target}", float(placed)))
        return shares

    def _placed(self, clause: Clause, group: Group, groups: Sequence[Group]) -> bool:
        relation, target = clause["position"]
        if not 0 <= target < len(groups):
            raise ValueError(f"position of {dict(clause)} points at clause {target}; there are {len(groups)}")
        others = groups[target]
        if relation not in RELATIONS:
            raise ValueError(f"position {relation!r} of {dict(clause)}; expected one of {', '.join(RELATIONS)}")
        return bool(others) and all(
            relation in relations(item, other, self.position_threshold) for item in group for other in others
        )


def relations(one: Detection, other: Detection, threshold: float = 0.1) -> set[str]:
    """How ``one`` lies to ``other``: a subset of left of, right of, above, below (published rule).

    The offset o of the box centres is shrunk on each axis by threshold·(w₁ + w₂) towards 0; the relation
    holds on an axis where what is left exceeds half of ‖o‖.
    """
    offset, left_over = [], []
    for axis in (0, 1):
        gap = (one.box[axis] + one.box[axis + 2] - other.box[axis] - other.box[axis + 2]) / 2
        sizes = one.box[axis + 2] - one.box[axis] + other.box[axis + 2] - other.box[axis]
        offset.append(gap)
        left_over.append(max(abs(gap) - threshold * sizes, 0.0) * (1 if gap > 0 else -1))
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    if max(abs(left_over[0]), abs(left_over[1])) < 1e-3:
        return set()
    x, y = left_over[0] / length, left_over[1] / length
    holds = zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True)
    return {relation for relation, true in holds if true}


def _clauses(metadata: Mapping[str, Any], key: str) -> list[Clause]:
    clauses = list(metadata.get(key) or [])
    for clause in clauses:
        count = clause.get("count") if isinstance(clause, Mapping) else None
        if not isinstance(count, int) or count < 1 or "class" not in clause:
            raise ValueError(
                f"'{key}' of GenEval metadata needs clauses with a class and a count >= 1, found {clause!r}"
            )
    return clauses


def _check_colors(clause: Clause, objects: Mapping[str, Group]) -> None:
    if "color" in clause and any(item.color is None for item in objects.get(clause["class"], ())):
        raise ValueError(f"the detector reports no colours, but the metadata asks for {dict(clause)}")


def _assign(include: Sequence[Clause], objects: Mapping[str, Group]) -> list[Group]:
    """The objects that each clause is judged on: the most confident, or a share where a class is named
    twice."""
    named = Counter(clause["class"] for clause in include)
    groups: list[Group] = [[] for _ in include]
    taken: set[int] = set()
    # Clauses that ask for a colour choose first, so that one without cannot take their only match.
    for index in sorted(range(len(include)), key=lambda index: "color" not in include[index]):
        clause = include[index]
        pool = list(objects.get(clause["class"], ()))
        if named[clause["class"]] > 1:
            color = clause.get("color")
            pool = [item for item in pool if id(item) not in taken and color in (None, item.color)]
        groups[index] = pool[: clause["count"]]
        taken.update(id(item) for item in groups[index])
    return groups


def _counts(item: Detection, clause: Clause) -> bool:
    """Whether the object counts against an exclude clause."""
    right_class = clause["class"] in (ANY, item.label) or item.label == UNKNOWN
    return right_class and clause.get("color", item.color) == item.color


def _suppress(group: Group, max_overlap: float) -> Group:
    """Greedy suppression of overlapping boxes of one class, the most confident kept."""
    if max_overlap >= 1.0:
        return group
    kept: Group = []
    for item in group:
        if all(_overlap(item, other) < max_overlap for other in kept):
            kept.append(item)
    return kept


def _overlap(one: Detection, other: Detection) -> float:
    """Intersection over union of two boxes."""
    a, b = one.box, other.box
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


@register("geneval", needs=("images", "metadata"))
def geneval(
    detector: str = "shapes",
    *,
    partial: bool = False,
    exact: bool = False,
    threshold: float = 0.3,
    counting_threshold: float = 0.9,
    max_overlap: float = 1.0,
    position_threshold: float = 0.1,
) -> GenEval:
    """Objects, counts, colours and positions of the prompt (GenEval): 1 or 0, or a share with partial=true.

    ``detector`` is "shapes" for the built-in world, or the hub id or folder of a transformers object
    detector.
    """
    chosen: Detector = ShapesDetector() if detector == "shapes" else TransformersDetector(detector)
    return GenEval(
        chosen,
        partial=partial,
        exact=exact,
        threshold=threshold,
        counting_threshold=counting_threshold,
        max_overlap=max_overlap,
        position_threshold=position_threshold,
    )
