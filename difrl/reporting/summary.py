"""Changes of a run: its first evaluation against its last.

summary.json in a run folder is `Summary.to_json()`: {"before": {...}, "after": {...}, "steps", "seconds",
"evaluations", "report", "picture", "model", "guard"}, where before and after are rows of evaluation metrics as in
metrics.jsonl (eval/reward/NAME beside eval/reward/NAME/stderr).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from difrl.reporting.number_format import CLEAR

STDERR = "/stderr"
DIVERSITY_LOSS = 0.25  # share of the initial diversity
PREFIXES = (("trained", "eval/reward/"), ("watched", "eval/watch/"), ("diversity", "eval/diversity/"))


@dataclass(frozen=True)
class Change:
    """One metric on the evaluation prompts, before and after training. Its role is trained, watched or diversity."""

    key: str
    role: str
    before: float
    after: float
    before_stderr: float = math.nan
    after_stderr: float = math.nan

    @property
    def name(self) -> str:
        return next(self.key.removeprefix(prefix) for role, prefix in PREFIXES if role == self.role)

    @property
    def label(self) -> str:
        return f"diversity ({self.name})" if self.role == "diversity" else self.name

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def stderr(self) -> float:
        """Standard error of the difference, sqrt(before² + after²). Rather large: both sides share prompts and noise."""
        return math.hypot(self.before_stderr, self.after_stderr)

    @property
    def direction(self) -> int:
        """Sign of a change beyond two standard errors, else 0. Without standard errors every change counts."""
        margin = CLEAR * self.stderr if math.isfinite(self.stderr) else 0.0
        if not math.isfinite(self.difference) or abs(self.difference) <= margin:
            return 0
        return 1 if self.difference > 0 else -1


def changes(
    before: Mapping[str, float], after: Mapping[str, float], stderr: Mapping[str, float] | None = None
) -> list[Change]:
    """Return the changes of the evaluation metrics that both rows have: trained rewards first, then watched, then diversity.

    `stderr` holds standard errors of `after` by metric key, for a row without its own KEY/stderr. The mean over rewards is
    left out if it repeats the only reward.
    """
    found = []
    for role, prefix in PREFIXES:
        keys = [key for key in after if key.startswith(prefix) and not key.endswith(STDERR) and key in before]
        if len(keys) == 2 and f"{prefix}mean" in keys:
            (other,) = (key for key in keys if key != f"{prefix}mean")
            if after[other] == after[f"{prefix}mean"] and before[other] == before[f"{prefix}mean"]:
                keys = [other]
        for key in sorted(keys, key=lambda one: one != f"{prefix}mean"):
            found.append(
                Change(
                    key,
                    role,
                    before[key],
                    after[key],
                    before.get(key + STDERR, math.nan),
                    after.get(key + STDERR, (stderr or {}).get(key, math.nan)),
                )
            )
    return found


def suspicious(found: list[Change]) -> list[Change]:
    """Return the watched rewards that fell while a trained one rose, and the diversities that fell far: signs of reward hacking.

    Every optimisation reduces diversity, so only a loss of more than DIVERSITY_LOSS counts.
    """
    if not any(change.role == "trained" and change.direction > 0 for change in found):
        return []
    fell = [change for change in found if change.role != "trained" and change.direction < 0]
    return [
        change
        for change in fell
        if change.role == "watched" or change.difference < -DIVERSITY_LOSS * abs(change.before)
    ]


@dataclass(frozen=True)
class RunSummary:
    """Result of a finished run, as printed and as written to summary.json."""

    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = math.nan
    evaluations: float = math.nan
    report: str = ""
    picture: str = ""
    model: str = ""
    guard: str = ""
    """Sentence on the guard's findings and action."""

    def to_json(self) -> str:
        """Return JSON. Numbers that are not finite become null."""
        return json.dumps(_finite(asdict(self)), indent=2) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
