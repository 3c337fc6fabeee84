"""Relative positions of boxes, by GenEval's published rules (evaluate_images.py of djghosh13/geneval)."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.detectors import Detection

RELATIONS = ("left of", "right of", "above", "below")


def relations(one: Detection, other: Detection, threshold: float = 0.1) -> set[str]:
    """Return the positions of ``one`` relative to ``other``: a subset of left of, right of, above, below.

    The offset o of the box centres is shrunk on each axis by threshold·(w₁ + w₂) towards 0. A relation holds on an axis
    where the remainder exceeds half of ‖o‖.
    """
    offset, remainder = [], []
    for axis in (0, 1):
        gap = (one.box[axis] + one.box[axis + 2] - other.box[axis] - other.box[axis + 2]) / 2
        sizes = one.box[axis + 2] - one.box[axis] + other.box[axis + 2] - other.box[axis]
        offset.append(gap)
        remainder.append(max(abs(gap) - threshold * sizes, 0.0) * (1 if gap > 0 else -1))
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    if max(abs(remainder[0]), abs(remainder[1])) < 1e-3:
        return set()
    x, y = remainder[0] / length, remainder[1] / length
    holds = zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True)
    return {relation for relation, true in holds if true}


def in_relation(relation: str, group: Sequence[Detection], others: Sequence[Detection], threshold: float) -> bool:
    """Whether the relation holds between every object of ``group`` and every object of ``others``."""
    if relation not in RELATIONS:
        raise ValueError(f"there is no position {relation!r}; expected one of {', '.join(RELATIONS)}")
    return all(relation in relations(item, other, threshold) for item in group for other in others)


def suppress(group: Sequence[Detection], max_overlap: float) -> list[Detection]:
    """Return the boxes without those that overlap an earlier (more confident) one; a `max_overlap` of 1 keeps all."""
    if max_overlap >= 1.0:
        return list(group)
    kept: list[Detection] = []
    for item in group:
        if all(overlap(item, other) < max_overlap for other in kept):
            kept.append(item)
    return kept


def overlap(one: Detection, other: Detection) -> float:
    """Return the intersection over union of two boxes. Corners are pixels inside the box: a side from 0 to 9 has length 10."""
    a, b = one.box, other.box
    shared = _area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = _area(*a) + _area(*b) - shared
    return shared / union if union > 0 else 0.0


def _area(left: float, top: float, right: float, bottom: float) -> float:
    return max(right - left + 1, 0.0) * max(bottom - top + 1, 0.0)
