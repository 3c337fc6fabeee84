"""The guard: it stops a run, or returns to an earlier step, when the trained reward rises while a watched measure falls.

At evaluation n a watched reward w has *fallen* if, with b the earlier evaluation at which w was highest,

    w_b − w_n > margin · se   and   r_n − r_b > margin · se          r: the trained reward, se: of that difference

and a diversity d has fallen if besides d_b − d_n > share · d_b. Both evaluations use the same prompts and noise, so
se = √(se_b² + se_n²) is too large. But b is the best of several noisy evaluations, which is an error in the other direction.
Therefore an evaluation at which a measure has fallen is only a strike, and the guard acts after `patience` strikes in a row. The
best evaluation is the one with the highest trained reward among those without a strike.

The verdict is a function of the rows of metrics.jsonl, so a resumed run and every process come to the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from difrl.config import GuardConfig
from difrl.reporting.number_format import number, plus_minus
from difrl.reporting.summary import STDERR

TRAINED_REWARD = "eval/reward/mean"
WATCHED_REWARDS = "eval/watch/"
DIVERSITY = "eval/diversity/"

MetricsRow = Mapping[str, float]
"""An evaluation: its step, and its eval/… metrics with their standard errors."""


@dataclass(frozen=True)
class Fall:
    """A watched measure that has fallen, with the rows of its best and of the last evaluation."""

    key: str
    best: MetricsRow
    now: MetricsRow

    def __str__(self) -> str:
        name = self.key.removeprefix(WATCHED_REWARDS).removeprefix("eval/")
        watched, trained = (
            f"{_format(self.best, key)} to {_format(self.now, key)}" for key in (self.key, TRAINED_REWARD)
        )
        return f"{name} fell from {watched} while the trained reward rose from {trained} since step {self.best['step']:.0f}"


@dataclass(frozen=True)
class Verdict:
    """Verdict after a number of evaluations."""

    falls: tuple[Fall, ...] = ()
    """The measures that have fallen at the last evaluation."""
    strikes: int = 0
    """Number of evaluations in a row, up to the last, at which a measure had fallen."""
    best: int = 0
    """Step of the best evaluation without a strike."""

    def metrics(self) -> dict[str, float]:
        """Return the guard/… metrics."""
        return {"guard/fallen": len(self.falls), "guard/strikes": self.strikes, "guard/best_step": self.best}

    def __str__(self) -> str:
        times = "" if self.strikes == 1 else f", at {self.strikes} evaluations in a row"
        return "; ".join(map(str, self.falls)) + times


@dataclass
class Guard:
    """The guard of a run, which observes every evaluation. Without a config it never acts."""

    config: GuardConfig | None
    rows: list[MetricsRow] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        return Verdict() if self.config is None else compute_verdict(self.rows, self.config)

    def observe(self, row: MetricsRow) -> dict[str, float]:
        """Add an evaluation, in place of earlier ones of the same or later steps. Return the guard/… metrics of its step."""
        self.rows = [*(r for r in self.rows if r["step"] < row["step"]), row]
        return {} if self.config is None else self.verdict.metrics()

    @property
    def alarm(self) -> bool:
        """Whether there were `patience` strikes in a row."""
        return self.config is not None and self.verdict.strikes >= self.config.patience

    @property
    def ends(self) -> bool:
        """Whether the guard ends the run at this evaluation."""
        return self.alarm and self.config is not None and self.config.action != "warn"

    def result(self, step: int) -> int:
        """Return the step whose weights are the result of a run that ends after `step`."""
        rolls_back = self.ends and self.config is not None and self.config.action == "rollback"
        return self.verdict.best if rolls_back else step

    @property
    def kept(self) -> tuple[int, ...]:
        """Steps whose checkpoints must not be removed."""
        return () if self.config is None else (self.verdict.best,)

    def message(self, step: int) -> str:
        """Return a message about the fall and its consequence; "" if there is no alarm."""
        if not self.alarm:
            return ""
        result = self.result(step)
        back = f"; the result is the model after step {result}, the best at which nothing had fallen"
        follows = (f"; stopped after step {step}" if self.ends else "") + (back if result != step else "")
        return f"guard: {self.verdict}{follows}"


def compute_verdict(rows: Sequence[MetricsRow], config: GuardConfig) -> Verdict:
    """Return the verdict after these evaluations, which are in the order of their steps."""
    struck = [bool(find_falls(rows[: n + 1], config)) for n in range(len(rows))]
    sound = [row for row, strike in zip(rows, struck, strict=True) if not strike and math.isfinite(row[TRAINED_REWARD])]
    best = max(sound, key=lambda row: row[TRAINED_REWARD], default={"step": 0.0})  # the first of equals
    strikes = next((n for n, strike in enumerate(reversed(struck)) if not strike), len(struck))
    return Verdict(find_falls(rows, config), strikes, int(best["step"]))


def find_falls(rows: Sequence[MetricsRow], config: GuardConfig) -> tuple[Fall, ...]:
    """Return the measures that have fallen at the last of these evaluations."""
    if not rows:
        return ()
    *earlier, now = rows
    found = []
    for key in _measures(now, config):
        best = max((row for row in earlier if _is_finite(row, key)), key=lambda row: row[key], default=None)
        if best is not None and _is_finite(now, key) and _fell(key, best, now, config):
            found.append(Fall(key, best, now))
    return tuple(found)


def _measures(row: MetricsRow, config: GuardConfig) -> list[str]:
    # Names with a slash are standard errors, and members of an ensemble, which is watched as a whole.
    rewards = [key for key in row if key.startswith(WATCHED_REWARDS) and "/" not in key.removeprefix(WATCHED_REWARDS)]
    if config.rewards is not None:
        rewards = [key for key in rewards if key.removeprefix(WATCHED_REWARDS) in config.rewards]
    diversity = [key for key in row if key.startswith(DIVERSITY) and not key.endswith(STDERR)]
    return [*rewards, *(diversity if config.diversity is not None else [])]


def _fell(key: str, best: MetricsRow, now: MetricsRow, config: GuardConfig) -> bool:
    drop, rise = best[key] - now[key], now[TRAINED_REWARD] - best[TRAINED_REWARD]
    share = (config.diversity or 0.0) * abs(best[key]) if key.startswith(DIVERSITY) else 0.0
    fell = drop > max(share, config.margin * _stderr(key, best, now))
    return fell and rise > config.margin * _stderr(TRAINED_REWARD, best, now)


def _stderr(key: str, one: MetricsRow, other: MetricsRow) -> float:
    """Standard error of the difference of two evaluations. An evaluation of one sample has none and counts as exact."""
    errors = (row.get(key + STDERR, 0.0) for row in (one, other))
    return math.hypot(*(error if math.isfinite(error) else 0.0 for error in errors))


def _is_finite(row: MetricsRow, key: str) -> bool:
    return math.isfinite(row.get(key, math.nan)) and math.isfinite(row[TRAINED_REWARD])


def _format(row: MetricsRow, key: str) -> str:
    return number(row[key]) + plus_minus(row.get(key + STDERR))
