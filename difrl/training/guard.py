"""The guard: ends a run, or takes it back, when it earns the trained reward at the cost of what is only watched.

At evaluation n a watched reward w has *fallen* if, with b the earlier evaluation at which w was highest,

    w_b − w_n > margin · se   and   r_n − r_b > margin · se          r: the trained reward, se: of that difference

and a diversity d has fallen if besides d_b − d_n > share · d_b. Both evaluations use the same prompts and noise, so
se = √(se_b² + se_n²) errs on the wide side; that b is the best of several noisy evaluations errs on the other, which is
what patience is for. An evaluation at which something has fallen is a strike; `patience` strikes in a row are acted on.
The best evaluation is the one with the highest trained reward among those without a strike.

Everything follows from the rows of metrics.jsonl up to now, so a resumed run and every process come to the same verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from difrl.config import GuardConfig
from difrl.reporting.number_format import number, plus_minus
from difrl.reporting.summary import STDERR

TRAINED = "eval/reward/mean"
WATCHED = "eval/watch/"
DIVERSITY = "eval/diversity/"

Row = Mapping[str, float]
"""An evaluation: its step, and eval/… metrics with their standard errors."""


@dataclass(frozen=True)
class Fall:
    """A watched measure at its best and now, and the trained reward at the same two evaluations."""

    key: str
    best: Row
    now: Row

    def __str__(self) -> str:
        name = self.key.removeprefix(WATCHED).removeprefix("eval/")
        watched, trained = (f"{_shown(self.best, key)} to {_shown(self.now, key)}" for key in (self.key, TRAINED))
        return f"{name} fell from {watched} while the trained reward rose from {trained} since step {self.best['step']:.0f}"


@dataclass(frozen=True)
class Verdict:
    """What the evaluations so far amount to."""

    falls: tuple[Fall, ...] = ()
    """At the last evaluation."""
    strikes: int = 0
    """Evaluations in a row, up to the last, at which something had fallen."""
    best: int = 0
    """The step of the best evaluation without a strike."""

    def metrics(self) -> dict[str, float]:
        """As guard/… in metrics.jsonl."""
        return {"guard/fallen": len(self.falls), "guard/strikes": self.strikes, "guard/best_step": self.best}

    def __str__(self) -> str:
        times = "" if self.strikes == 1 else f", at {self.strikes} evaluations in a row"
        return "; ".join(map(str, self.falls)) + times


@dataclass
class Guard:
    """The guard of a run, told of every evaluation in turn; without a config it holds no opinion."""

    config: GuardConfig | None
    rows: list[Row] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        return Verdict() if self.config is None else judge(self.rows, self.config)

    def observe(self, row: Row) -> dict[str, float]:
        """Takes an evaluation in; the guard/… metrics of its step. An evaluation before the first step begins anew."""
        self.rows = [*(r for r in self.rows if r["step"] < row["step"]), row]
        return {} if self.config is None else self.verdict.metrics()

    @property
    def alarmed(self) -> bool:
        """Whether there were enough strikes in a row."""
        return self.config is not None and self.verdict.strikes >= self.config.patience

    @property
    def ends(self) -> bool:
        """Whether the run ends here."""
        return self.alarmed and self.config is not None and self.config.action != "warn"

    def result(self, step: int) -> int:
        """The step whose weights are the result of a run that ends after `step`."""
        rolls_back = self.ends and self.config is not None and self.config.action == "rollback"
        return self.verdict.best if rolls_back else step

    @property
    def kept(self) -> tuple[int, ...]:
        """Steps whose checkpoints are not to be removed."""
        return () if self.config is None else (self.verdict.best,)

    def message(self, step: int) -> str:
        """What was found and what follows, in plain words; "" where there is nothing to say."""
        if not self.alarmed:
            return ""
        result = self.result(step)
        back = f"; the result is the model after step {result}, the best at which nothing had fallen"
        follows = (f"; stopped after step {step}" if self.ends else "") + (back if result != step else "")
        return f"guard: {self.verdict}{follows}"


def judge(rows: Sequence[Row], config: GuardConfig) -> Verdict:
    """The verdict after the evaluations `rows`, in the order of their steps."""
    struck = [bool(falls(rows[: n + 1], config)) for n in range(len(rows))]
    sound = [row for row, strike in zip(rows, struck, strict=True) if not strike and math.isfinite(row[TRAINED])]
    best = max(sound, key=lambda row: row[TRAINED], default={"step": 0.0})  # the first of equals
    strikes = next((n for n, strike in enumerate(reversed(struck)) if not strike), len(struck))
    return Verdict(falls(rows, config), strikes, int(best["step"]))


def falls(rows: Sequence[Row], config: GuardConfig) -> tuple[Fall, ...]:
    """What has fallen at the last of these evaluations, the first of which cannot have."""
    if not rows:
        return ()
    *earlier, now = rows
    found = []
    for key in _measures(now, config):
        best = max((row for row in earlier if _known(row, key)), key=lambda row: row[key], default=None)
        if best is not None and _known(now, key) and _fell(key, best, now, config):
            found.append(Fall(key, best, now))
    return tuple(found)


def _measures(row: Row, config: GuardConfig) -> list[str]:
    # Names with a slash are standard errors, and members of an ensemble, which is watched as a whole.
    rewards = [key for key in row if key.startswith(WATCHED) and "/" not in key.removeprefix(WATCHED)]
    if config.rewards is not None:
        rewards = [key for key in rewards if key.removeprefix(WATCHED) in config.rewards]
    diversity = [key for key in row if key.startswith(DIVERSITY) and not key.endswith(STDERR)]
    return [*rewards, *(diversity if config.diversity is not None else [])]


def _fell(key: str, best: Row, now: Row, config: GuardConfig) -> bool:
    drop, rise = best[key] - now[key], now[TRAINED] - best[TRAINED]
    share = (config.diversity or 0.0) * abs(best[key]) if key.startswith(DIVERSITY) else 0.0
    fell = drop > max(share, config.margin * _stderr(key, best, now))
    return fell and rise > config.margin * _stderr(TRAINED, best, now)


def _stderr(key: str, one: Row, other: Row) -> float:
    """Of the difference of two evaluations; one of a single sample has none and counts as exact."""
    errors = (row.get(key + STDERR, 0.0) for row in (one, other))
    return math.hypot(*(error if math.isfinite(error) else 0.0 for error in errors))


def _known(row: Row, key: str) -> bool:
    return math.isfinite(row.get(key, math.nan)) and math.isfinite(row[TRAINED])


def _shown(row: Row, key: str) -> str:
    return number(row[key]) + plus_minus(row.get(key + STDERR))
