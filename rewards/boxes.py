"""Where boxes lie to each other, by GenEval's published rules (evaluate_images.py of djghosh13/geneval)."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.detectors import Detection

RELATIONS = ("left of", "right of", "above", "below")


def relations(one: Detection, other: Detection, threshold: float = 0.1) -> set[str]:
    """How ``one`` lies to ``other``: a subset of left of, right of, above, below.

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


def in_relation(relation: str, group: Sequence[Detection], others: Sequence[Detection], threshold: float) -> bool:
    """Whether every object of ``group`` lies so to every one of ``others``."""
    if relation not in RELATIONS:
        raise ValueError(f"there is no position {relation!r}; expected one of {', '.join(RELATIONS)}")
    return all(relation in relations(item, other, threshold) for item in group for other in others)


def suppress(group: Sequence[Detection], max_overlap: float) -> list[Detection]:
    """Greedy suppression of overlapping boxes, the first (most confident) kept; 1 keeps all."""
    if max_overlap >= 1.0:
        return list(group)
    kept: list[Detection] = []
    for item in group:
        if all(overlap(item, other) < max_overlap for other in kept):
            kept.append(item)
    return kept


def overlap(one: Detection, other: Detection) -> float:
    """Intersection over union of two boxes whose corners are pixels inside: a side from 0 to 9 is 10 long."""
    a, b = one.box, other.box
    shared = _area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = _area(*a) + _area(*b) - shared
    return shared / union if union > 0 else 0.0


def _area(left: float, top: float, right: float, bottom: float) -> float:
    return max(right - left + 1, 0.0) * max(bottom - top + 1, 0.0)
