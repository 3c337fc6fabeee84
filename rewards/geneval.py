"""GenEval: does the picture show the objects, counts, colours and positions of the prompt? (2310.11513)

Metadata have the published format: ``tag``, ``include`` and ``exclude`` lists of clauses, ``prompt``. A clause of
``include`` requires ``count`` objects of ``class``. With ``color`` they must have that colour, and with ``position``
(``["left of", k]``) that position relative to the objects of clause k. A clause of ``exclude`` fails the picture if it
has ``count`` or more objects of ``class``. The rules are those of the published evaluation (evaluate_images.py of
djghosh13/geneval): all clauses must hold; only the ``count`` most confident objects of a class are considered; the
confidence threshold is 0.3, or 0.9 for counting; at most 16 objects a class. If the detector does not report colours,
CLIP classifies the object's crop (rewards.colors).

Differences from the published evaluation:

* If two or more clauses name the *same* class ("a red circle and a blue circle", which no published prompt does), the
  published rule would require the one most confident object to be both. Here each such clause takes its objects from
  those that no other clause has taken, those of the right colour first.
* ``position`` may refer to a later clause. In an ``exclude`` clause the class ``"*"`` means objects of all classes
  together, and a ``color`` restricts the objects that are counted. Objects that the detector reports as `unknown` (a
  blob that may be a failed third circle) count for every class.
* A class or colour that the detector or the colour model can never report is an error; in the published code it is a 0.
* ``exact=True`` also requires that the picture contains nothing but the objects of ``include``.
* ``partial=True`` gives the mean over requirements instead of all-or-nothing. The requirements of an ``include`` clause
  are its count (found/count, at most 1), its colour (matching/count) and its position (0 or 1); an ``exclude`` clause
  is one requirement (0 or 1). The mean is 1 exactly where the strict score is 1.
* ``partial="flow_grpo"`` is the training reward of Flow-GRPO instead (rewards.flow_grpo_credit).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rewards.base import Metadata, MetadataError, Preloadable, Scores, check_images
from rewards.boxes import in_relation, suppress
from rewards.classes import ANY, Clause, UnknownClass
from rewards.colors import COLOR_MODEL, ClipColors, Colors
from rewards.detectors import UNKNOWN_SHAPE, Detection, Detector, ShapesDetector
from rewards.flow_grpo_credit import flow_grpo_credit
from rewards.sources import check_sources
from rewards.transformers_detector import TransformersDetector

Group = list[Detection]


@dataclass
class GenEval:
    """The GenEval reward with any detector: 1 or 0, or with ``partial`` the share of requirements that are met."""

    detector: Detector = field(default_factory=ShapesDetector)
    colors: Colors | None = None  # for detectors that report no colours
    partial: bool | Literal["flow_grpo"] = False
    exact: bool = False  # also fail pictures with more objects, of any class, than the prompt has
    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16  # of a class
    max_overlap: float = 1.0  # boxes of a class that overlap more count once; 1 keeps all, as published
    position_threshold: float = 0.1
    name: str = "geneval"
    needs: tuple[str, ...] = ("images", "metadata")

    def __post_init__(self) -> None:
        if self.partial not in (False, True, "flow_grpo"):
            raise ValueError(f"partial is true, false or flow_grpo, found {self.partial!r}")
        if self.partial == "flow_grpo" and self.exact:
            raise ValueError("partial=flow_grpo counts the objects that a prompt names and no others: leave exact out")

    def preload(self) -> None:
        """Load the detector and the colour model now."""
        for part in (self.detector, self.colors):
            if isinstance(part, Preloadable):
                part.preload()

    def to(self, device: torch.device | str) -> GenEval:
        """Move the detector and the colour model, and return the reward."""
        self.detector = self.detector.to(device)
        self.colors = None if self.colors is None else self.colors.to(device)
        return self

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W]. A row without requirements in its metadata is invalid."""
        images = check_images(samples, self.name)
        rows = [row for row, each in enumerate(metadata) if any(each.get(key) for key in self._clause_keys)]
        wanted: list[list[str]] = [[] for _ in metadata]
        for row in rows:
            with _errors_of_row(self.name, row, prompts[row]):
                wanted[row] = [clause["class"] for clause in self._scored_clauses(metadata[row])]
                wanted[row] += [ANY] if self.exact else []
        try:
            found = self.detector(images, wanted)
        except UnknownClass as error:
            raise MetadataError(self.name, str(error), error.image, prompts[error.image]) from error
        detections = self._add_colors(images, found, metadata, rows)
        values: list[float | None] = [None] * len(metadata)
        for row in rows:
            with _errors_of_row(self.name, row, prompts[row]):
                values[row] = self.judge(detections[row], metadata[row])
        return Scores.from_list(values).to(samples.device)

    def judge(self, detections: Sequence[Detection], metadata: Mapping[str, Any]) -> float:
        """Return the score of one image, given its detections."""
        if self.partial == "flow_grpo":
            objects, include = self._confident_objects(detections, metadata.get("tag")), _clauses(metadata, "include")
            for clause in include:
                self._check_colors(clause, objects)
            return flow_grpo_credit(objects, include, self.position_threshold)
        shares = [share for _, share in self.requirements(detections, metadata)]
        return sum(shares) / len(shares) if self.partial else float(min(shares) >= 1.0)

    def requirements(self, detections: Sequence[Detection], metadata: Mapping[str, Any]) -> list[tuple[str, float]]:
        """Return every requirement of the metadata in words, with the share of it that is met."""
        objects = self._confident_objects(detections, metadata.get("tag"))
        include = _clauses(metadata, "include")
        exclude = _clauses(metadata, "exclude")
        for clause in (*include, *exclude):
            self._check_colors(clause, objects)
        shares: list[tuple[str, float]] = []
        groups = _assign(include, objects)
        for clause, group in zip(include, groups, strict=True):
            shares += self._include_shares(clause, group, groups)
        if self.exact:
            exclude.append({"class": ANY, "count": sum(clause["count"] for clause in include) + 1})
        for clause in exclude:
            found = sum(_is_excluded(item, clause) for items in objects.values() for item in items)
            wanted = f"fewer than {clause['count']} {clause.get('color', '')} {clause['class']}"
            shares.append((" ".join(wanted.split()), float(found < clause["count"])))
        return shares

    @property
    def _clause_keys(self) -> tuple[str, ...]:
        """The keys of the metadata whose clauses count."""
        return ("include",) if self.partial == "flow_grpo" else ("include", "exclude")

    def _scored_clauses(self, metadata: Mapping[str, Any]) -> list[Clause]:
        return [clause for key in self._clause_keys for clause in _clauses(metadata, key)]

    def _confident_objects(self, detections: Sequence[Detection], tag: str | None) -> dict[str, Group]:
        """Return the objects above the threshold by class, the most confident first."""
        threshold = self.counting_threshold if tag == "counting" else self.threshold
        objects: dict[str, Group] = {}
        for item in sorted(detections, key=lambda item: -item.score):
            group = objects.setdefault(item.label, [])
            if item.score > threshold and len(group) < self.max_objects:
                group.append(item)
        return {label: suppress(group, self.max_overlap) for label, group in objects.items()}

    def _add_colors(
        self, images: Tensor, detections: Sequence[Group], metadata: Metadata, rows: Sequence[int]
    ) -> Sequence[Group]:
        """Return the detections, with colours for those that have none and whose colour a clause needs."""
        if self.colors is None:
            return detections
        missing: list[tuple[int, int]] = []
        for row in rows:
            found, meta = detections[row], metadata[row]
            classes = {clause["class"] for clause in self._scored_clauses(meta) if "color" in clause}
            kept = {id(item) for group in self._confident_objects(found, meta.get("tag")).values() for item in group}
            for place, item in enumerate(found):
                if id(item) in kept and item.color is None and (item.label in classes or ANY in classes):
                    missing.append((row, place))
        colors = self.colors(images, [(row, detections[row][place]) for row, place in missing])
        colored = [list(found) for found in detections]
        for (row, place), color in zip(missing, colors, strict=True):
            colored[row][place] = colored[row][place]._replace(color=color)
        return colored

    def _check_colors(self, clause: Clause, objects: Mapping[str, Group]) -> None:
        if "color" not in clause:
            return
        if any(item.color is None for item in objects.get(clause["class"], ())):
            raise ValueError(f"the detector reports no colours, but the metadata asks for {dict(clause)}: give colors")
        if self.colors is not None and clause["color"] not in self.colors.names:
            raise ValueError(f"the colour of {dict(clause)} is none of {', '.join(self.colors.names)}")

    def _include_shares(self, clause: Clause, group: Group, groups: Sequence[Group]) -> list[tuple[str, float]]:
        """Return the requirements of an ``include`` clause with their shares, given the objects of each clause."""
        count, words = clause["count"], f"{clause['count']} {clause['class']}"
        shares = [(words, len(group) / count)]
        complete = len(group) == count
        if "color" in clause:
            colored = sum(item.color == clause["color"] for item in group)
            shares.append((f"{words} {clause['color']}", colored / count))
            complete = complete and colored == count
        if "position" in clause:
            relation, target = clause["position"]
            placed = self._is_placed(clause, group, groups) and complete
            shares.append((f"{words} {relation} clause {target}", float(placed)))
        return shares

    def _is_placed(self, clause: Clause, group: Group, groups: Sequence[Group]) -> bool:
        relation, target = clause["position"]
        if not 0 <= target < len(groups):
            raise ValueError(f"position of {dict(clause)} points at clause {target}; there are {len(groups)}")
        others = groups[target]
        return in_relation(relation, group, others, self.position_threshold) and bool(others)


@contextmanager
def _errors_of_row(name: str, row: int, prompt: str) -> Iterator[None]:
    """Turn a ValueError into a MetadataError with its row."""
    try:
        yield
    except ValueError as error:
        raise MetadataError(name, str(error), row, prompt) from error


def _clauses(metadata: Mapping[str, Any], key: str) -> list[Clause]:
    clauses = metadata.get(key) or []
    if not isinstance(clauses, list | tuple):
        raise ValueError(f"'{key}' of GenEval metadata is a list of clauses, found {clauses!r}")
    for clause in clauses:
        count = clause.get("count") if isinstance(clause, Mapping) else None
        if not isinstance(count, int) or count < 1 or not isinstance(clause.get("class"), str):
            raise ValueError(
                f"'{key}' of GenEval metadata needs clauses with a class and a count >= 1, found {clause!r}"
            )
        match clause.get("position", ("", 0)):
            case [str(), int()]:
                pass
            case other:
                raise ValueError(f'a position is ["left of", k], k the index of a clause, found {other!r}')
    return list(clauses)


def _assign(include: Sequence[Clause], objects: Mapping[str, Group]) -> list[Group]:
    """Return the objects of each clause: the most confident of its class, without sharing them if a class occurs twice."""
    occurrences = Counter(clause["class"] for clause in include)
    groups: list[Group] = [[] for _ in include]
    taken: set[int] = set()
    # Clauses with a colour choose first, so that one without cannot take their only match.
    for index in sorted(range(len(include)), key=lambda index: "color" not in include[index]):
        clause = include[index]
        pool = list(objects.get(clause["class"], ()))
        if occurrences[clause["class"]] > 1:
            color = clause.get("color")
            pool = [item for item in pool if id(item) not in taken and color in (None, item.color)]
        groups[index] = pool[: clause["count"]]
        taken.update(id(item) for item in groups[index])
    return groups


def _is_excluded(item: Detection, clause: Clause) -> bool:
    """Whether the object counts against an ``exclude`` clause."""
    right_class = clause["class"] in (ANY, item.label) or item.label == UNKNOWN_SHAPE
    return right_class and clause.get("color", item.color) == item.color


def geneval(
    detector: str = "shapes",
    *,
    color_model: str = COLOR_MODEL,
    partial: bool | Literal["flow_grpo"] = GenEval.partial,
    exact: bool = GenEval.exact,
    threshold: float = GenEval.threshold,
    counting_threshold: float = GenEval.counting_threshold,
    max_objects: int = GenEval.max_objects,
    max_overlap: float = GenEval.max_overlap,
    position_threshold: float = GenEval.position_threshold,
    batch_size: int = 8,
) -> GenEval:
    """Objects, counts, colours and positions of the prompt (GenEval): 1 or 0, or a share with partial=true.

    detector: shapes for the built-in task, or the hub id or folder of a transformers model for instance segmentation
    (facebook/mask2former-swin-small-coco-instance is nearest to the published one), object detection or zero-shot
    detection. color_model: the CLIP model that then classifies colours, loaded with the detector by `preload`, or for the
    first prompt with a colour. partial: true for the share of requirements that are met, flow_grpo for the training
    reward of Flow-GRPO. exact: the picture may contain nothing else. threshold: confidence above which an object
    counts; counting_threshold: the same where the metadata's tag is counting. max_objects: at most this many of a
    class. max_overlap: boxes of a class that overlap more are one object; 1 keeps all. position_threshold: share of two
    objects' sizes that is subtracted from their distance. batch_size: images detected at once.
    """
    shapes = detector == "shapes"
    if not shapes:
        check_sources("geneval", detector=detector)
    lowest = min(threshold, counting_threshold)
    return GenEval(
        ShapesDetector() if shapes else TransformersDetector(detector, threshold=lowest, batch_size=batch_size),
        None if shapes else ClipColors(color_model),
        partial=partial,
        exact=exact,
        threshold=threshold,
        counting_threshold=counting_threshold,
        max_objects=max_objects,
        max_overlap=max_overlap,
        position_threshold=position_threshold,
    )
