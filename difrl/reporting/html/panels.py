"""Which metrics share a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from difrl.reporting.html.charts import Line
from difrl.reporting.html.read_run import RunRecord
from difrl.reporting.summary import STDERR

COLOURS = 6  # in page.css


@dataclass(frozen=True)
class Curve:
    """A metric of a run in a chart; error names the metric that is half the height of its band."""

    run: RunRecord
    key: str
    label: str
    colour: int
    error: str = ""
    dots: bool = False
    smooth: bool = True

    def line(self, axis: str) -> Line:
        rows = [row for row in self.run.rows if self.key in row and math.isfinite(row[axis])]
        errors = [row.get(self.error, math.nan) for row in rows] if self.error else []
        x, y = [row[axis] for row in rows], [row[self.key] for row in rows]
        return Line(self.key, self.label, x, y, self.colour, errors, self.dots, self.smooth)


@dataclass(frozen=True)
class Chart:
    """One figure: a title, its curves, and a sentence on how to read it. log: fit for a logarithmic axis."""

    title: str
    curves: list[Curve] = field(default_factory=list)
    note: str = ""
    stacked: bool = False
    log: bool = False


def training_charts(run: RunRecord) -> list[Chart]:
    """The charts of one run, in reading order; a chart without data is left out."""
    charts = [
        _reward(run),
        _each_reward(run),
        _family(run, "Watched, never optimised", "watch/", "A fall while the reward rises: it is being exploited."),
        _family(run, "Divergence from anchors", "kl/", "How far training has moved from each anchor.", log=True),
        _family(run, "Coefficients of anchors", "coefficient/", "What each divergence is multiplied by.", log=True),
        _family(run, "Diversity within a prompt", "diversity/", "A fall: samples of one prompt grow alike."),
        _named(
            run,
            "Ratio to the sampling policy",
            {"ratio/mean": "mean"},
            "Band: one standard deviation over decisions. Near 1, samples are on-policy.",
            error="ratio/std",
        ),
        _named(
            run,
            "Shares without gradient",
            {"clip/high": "clipped above", "clip/low": "clipped below", "groups/zero_std": "idle groups"},
            "Idle: all samples of the prompt had the same reward.",
        ),
        _named(run, "Gradient norm", {"grad_norm": "before clipping"}, log=True),
        _named(run, "Loss", {"loss": "loss"}),
        _named(run, "Learning rate", {"lr": "learning rate"} if _moves(run, "lr") else {}, smooth=False),
        _times(run),
    ]
    return [chart for chart in charts if chart.curves]


def other_charts(run: RunRecord) -> list[Chart]:
    """Metrics no chart above shows, grouped by the first part of their name: nothing logged is hidden."""
    shown = {curve.key for chart in training_charts(run) for curve in chart.curves} | {"ratio/std"}
    groups: dict[str, list[str]] = {}
    for key in run.metrics():
        if key not in shown and not key.endswith(STDERR) and not _repeats_mean(run, key):
            groups.setdefault(key.rpartition("/")[0] or key, []).append(key)
    return [
        Chart(name, [Curve(run, key, key.rpartition("/")[2], _colour(index)) for index, key in enumerate(keys)])
        for name, keys in groups.items()
    ]


def comparison_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """One chart a measure, one colour a run."""
    metrics = list(dict.fromkeys(key for run in runs for key in run.metrics()))
    wanted = ["eval/reward/mean" if "eval/reward/mean" in metrics else "reward/mean"]
    for prefix in ("eval/watch/", "eval/diversity/", "kl/"):
        wanted += [key for key in metrics if key.startswith(prefix) and not key.endswith(STDERR)]
    charts = []
    for key in wanted:
        evaluated = key.startswith("eval/")
        curves = [
            Curve(run, key, run.name, _colour(index), f"{key}{STDERR}" if evaluated else "", evaluated)
            for index, run in enumerate(runs)
            if key in run.metrics()
        ]
        charts.append(Chart(spoken(key), curves, log=key.startswith("kl/")))
    return [chart for chart in charts if chart.curves]


def spoken(key: str) -> str:
    """A metric's name as a title."""
    if key.endswith("reward/mean"):
        return "Reward on evaluation prompts" if key.startswith("eval/") else "Reward"
    name = key.rpartition("/")[2]
    titles = {
        "watch/": f"Watched: {name}",
        "diversity/": f"Diversity: {name}",
        "kl/": f"Divergence from {name}",
        "divergence/": f"Divergence from {name}",
    }
    return next((title for part, title in titles.items() if part in key), key)


def _reward(run: RunRecord) -> Chart:
    metrics, curves, note = run.metrics(), [], ""
    if "reward/mean" in metrics:
        curves.append(Curve(run, "reward/mean", "training prompts", 1))
    if "eval/reward/mean" in metrics:
        error = f"eval/reward/mean{STDERR}"
        curves.append(Curve(run, "eval/reward/mean", "evaluation prompts", 2, error, dots=True))
        note = "Band: one standard error of the mean on evaluation prompts."
    return Chart("Reward", curves, note)


def _each_reward(run: RunRecord) -> Chart:
    """Single rewards, where there are several: on evaluation prompts if evaluated, else from the rollouts."""
    for prefix, note in (("eval/reward/", "On evaluation prompts."), ("reward/", "On training prompts.")):
        keys = [key for key in run.metrics() if key.startswith(prefix) and not key.endswith((STDERR, "/mean"))]
        if len(keys) > 1:
            evaluated = prefix.startswith("eval/")
            curves = [
                Curve(
                    run,
                    key,
                    key.removeprefix(prefix),
                    _colour(index),
                    f"{key}{STDERR}" if evaluated else "",
                    evaluated,
                )
                for index, key in enumerate(keys)
            ]
            return Chart("Each trained reward", curves, note)
    return Chart("Each trained reward")


def _family(run: RunRecord, title: str, prefix: str, note: str, log: bool = False) -> Chart:
    """Every name under a prefix: from the rollouts, then on evaluation prompts."""
    curves: list[Curve] = []
    for start in (prefix, f"eval/{prefix}"):
        for key in run.metrics():
            if key.startswith(start) and not key.endswith(STDERR):
                evaluated = start != prefix
                label = key.removeprefix(start) + (", evaluation" if evaluated else "")
                error = f"{key}{STDERR}" if evaluated else ""
                curves.append(Curve(run, key, label, _colour(len(curves)), error, evaluated))
    return Chart(title, curves, note, log=log)


def _named(
    run: RunRecord,
    title: str,
    labels: dict[str, str],
    note: str = "",
    *,
    error: str = "",
    log: bool = False,
    smooth: bool = True,
) -> Chart:
    """The metrics in `labels` that the run has."""
    found = [(key, label) for key, label in labels.items() if key in run.metrics()]
    curves = [Curve(run, key, label, _colour(index), error, smooth=smooth) for index, (key, label) in enumerate(found)]
    return Chart(title, curves, note, log=log)


def _moves(run: RunRecord, key: str) -> bool:
    return len(set(run.series(key, "step")[1])) > 1


def _times(run: RunRecord) -> Chart:
    keys = [key for key in run.metrics() if key.startswith("time/")]
    curves = [Curve(run, key, key.removeprefix("time/"), _colour(index)) for index, key in enumerate(keys)]
    return Chart("Where the time goes", curves, "Seconds a step.", stacked=True)


def _repeats_mean(run: RunRecord, key: str) -> bool:
    """The only reward, where it is the mean over rewards under another name."""
    prefix = key.rpartition("/")[0]
    return prefix in ("reward", "eval/reward") and run.series(key, "step") == run.series(f"{prefix}/mean", "step")


def _colour(index: int) -> int:
    return index % COLOURS + 1
