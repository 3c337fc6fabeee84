"""GenEval with partial credit as Flow-GRPO trains on it (2505.05470; evaluate_reward in yifan123/reward-server).

The mean over these numbers, clause by clause of ``include``; ``exclude`` is not read:

* 1 − |found − count|/count, where *all* confident objects of the class count: below 0 for more than twice as
  many as asked for.
* If the clause has a colour or a position and the number is not right: one 0.
* If it is right and there is a colour: 1 − |matching − count|/count.
* If that is all right too and there is a position: 1 if it holds; if it does not, a 0 *and* a 1 (the 1 is
  surely an oversight of the published code, kept because the published numbers contain it); 0 if the clause
  pointed at is not all right itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.boxes import in_relation
from rewards.detectors import Detection


def flow_grpo_credit(
    objects: Mapping[str, Sequence[Detection]], include: Sequence[Mapping[str, Any]], position_threshold: float
) -> float:
    """The credit for confident ``objects`` by class; ``include`` is the metadata's, with earlier targets only."""
    credits: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in include:
        group, count = objects.get(clause["class"], ()), clause["count"]
        credits.append(1 - abs(count - len(group)) / count)
        right = len(group) == count
        if not right and ("color" in clause or "position" in clause):
            credits.append(0.0)
        elif right and "color" in clause:
            matching = sum(item.color == clause["color"] for item in group)
            credits.append(matching / count)
            right = matching == count
        if right and "position" in clause:
            placed = _position(clause, group, groups, position_threshold)
            credits += placed
            right = placed == [1.0]
        groups.append(group if right else None)
    return sum(credits) / len(credits)


def _position(
    clause: Mapping[str, Any],
    group: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    threshold: float,
) -> list[float]:
    relation, target = clause["position"]
    if not 0 <= target < len(groups):
        raise ValueError(
            f"position of {dict(clause)} points at clause {target}; flow_grpo knows {len(groups)} before it"
        )
    others = groups[target]
    if others is None:
        return [0.0]
    return [1.0] if in_relation(relation, group, others, threshold) else [0.0, 1.0]
