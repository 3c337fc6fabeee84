"""GenEval with partial credit, the training reward of Flow-GRPO (2505.05470; evaluate_reward in yifan123/reward-server).

The credit is the mean over these numbers for every clause of ``include``. ``exclude`` is ignored.

* 1 − |found − count|/count, where *all* confident objects of the class are found: below 0 for more than twice the
  count.
* If the count is wrong and the clause has a colour or a position: one 0.
* If the count is right and there is a colour: 1 − |matching − count|/count.
* If that is right too and there is a position: 1 if it holds. If it does not hold, a 0 *and* a 1; the 1 is surely an
  oversight of the published code, kept because the published numbers contain it. If the other clause of the position
  is not completely right: 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rewards.boxes import in_relation
from rewards.classes import Clause
from rewards.detectors import Detection


def flow_grpo_credit(
    objects: Mapping[str, Sequence[Detection]], include: Sequence[Clause], position_threshold: float
) -> float:
    """Return the credit for confident ``objects`` by class. ``include`` is that of the metadata.

    Positions may refer to earlier clauses only, else ValueError.
    """
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
    clause: Clause,
    group: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    threshold: float,
) -> list[float]:
    relation, target = clause["position"]
    if not 0 <= target < len(groups):
        raise ValueError(f"position of {dict(clause)} points at clause {target}; flow_grpo has {len(groups)} before it")
    others = groups[target]
    if others is None:
        return [0.0]
    return [1.0] if in_relation(relation, group, others, threshold) else [0.0, 1.0]
