"""Charts of a report: the metrics of each, with titles and notes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from difrl.reporting.html.charts import Line
from difrl.reporting.html.read_run import RunRecord
from difrl.reporting.summary import STDERR

SERIES_COLOURS = 6  # in page.css


@dataclass(frozen=True)
class Curve:
    """A metric of a run in a chart. `error` is the key of the metric that is half the height of its band."""

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
    """One figure: a title, its curves, and a sentence on how to read it. With `log` its axis may be logarithmic."""

    title: str
    curves: list[Curve] = field(default_factory=list)
    note: str = ""
    stacked: bool = False
    log: bool = False


def training_charts(run: RunRecord) -> list[Chart]:
    """Return the charts of one run, in reading order. A chart without data is left out."""
    evaluated = "eval/reward/mean" in run.metrics()
    lr_moves = len(set(run.series("lr", "step")[1])) > 1
    charts = [
        _chart(
            run,
            "Reward",
            {"reward/mean": "training prompts", "eval/reward/mean": "evaluation prompts"},
            "Band: one standard error of the mean on evaluation prompts." if evaluated else "",
        ),
        _each_reward(run),
        _family(
            run, "Watched, never optimised", "watch/", "A fall while the reward rises is a sign of reward hacking."
        ),
        _family(run, "Divergence from anchors", "kl/", "Distance of the trained model from each anchor.", log=True),
        _family(run, "Coefficients of anchors", "coefficient/", "Factor of each divergence.", log=True),
        _family(
            run, "Diversity within a prompt", "diversity/", "A fall means that samples of one prompt become more alike."
        ),
        _chart(
            run,
            "Ratio to the sampling policy",
            {"ratio/mean": "mean"},
            "Band: one standard deviation over decisions. Near 1 the samples are on-policy.",
            error="ratio/std",
        ),
        _chart(
            run,
            "Shares without gradient",
            {"clip/high": "clipped above", "clip/low": "clipped below", "groups/zero_std": "idle groups"},
            "Idle groups: all samples of the prompt had the same reward.",
        ),
        _chart(run, "Gradient norm", {"grad_norm": "before clipping"}, log=True),
        _chart(run, "Loss", {"loss": "loss"}),
        _chart(run, "Learning rate", {"lr": "learning rate"} if lr_moves else {}, smooth=False),
        _chart(run, "Where the time goes", _names(run, "time/"), "Seconds a step.", stacked=True),
    ]
    return [chart for chart in charts if chart.curves]


def other_charts(run: RunRecord) -> list[Chart]:
    """Return charts of the metrics that no chart above shows, grouped by the first part of their name."""
    shown = {curve.key for chart in training_charts(run) for curve in chart.curves} | {"ratio/std"}
    groups: dict[str, list[str]] = {}
    for key in run.metrics():
        group = key.rpartition("/")[0]
        same_as_mean = group in ("reward", "eval/reward") and run.series(key, "step") == run.series(
            f"{group}/mean", "step"
        )
        if key not in shown and not key.endswith(STDERR) and not same_as_mean:
            groups.setdefault(group or key, []).append(key)
    return [
        Chart(name, [Curve(run, key, key.rpartition("/")[2], nth_colour(index)) for index, key in enumerate(keys)])
        for name, keys in groups.items()
    ]


def comparison_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Return one chart a metric, with one colour a run."""
    metrics = list(dict.fromkeys(key for run in runs for key in run.metrics()))
    keys = ["eval/reward/mean" if "eval/reward/mean" in metrics else "reward/mean"]
    for prefix in ("eval/watch/", "eval/diversity/", "kl/"):
        keys += [key for key in metrics if key.startswith(prefix) and not key.endswith(STDERR)]
    charts = []
    for key in keys:
        curves = [_curve(run, key, run.name, i) for i, run in enumerate(runs) if key in run.metrics()]
        charts.append(Chart(metric_title(key), curves, log=key.startswith("kl/")))
    return [chart for chart in charts if chart.curves]


def metric_title(key: str) -> str:
    """Return the title of a chart of this metric alone."""
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


def nth_colour(index: int) -> int:
    """Return the colour, 1 to COLOURS, of the curve or run at this index."""
    return index % SERIES_COLOURS + 1


def _each_reward(run: RunRecord) -> Chart:
    """Return the single rewards if there are several: on evaluation prompts if evaluated, else on training prompts."""
    for prefix, note in (("eval/reward/", "On evaluation prompts."), ("reward/", "On training prompts.")):
        labels = {key: name for key, name in _names(run, prefix).items() if not key.endswith("/mean")}
        if len(labels) > 1:
            return _chart(run, "Each trained reward", labels, note)
    return Chart("Each trained reward")


def _family(run: RunRecord, title: str, prefix: str, note: str, *, log: bool = False) -> Chart:
    """Return every metric under a prefix, of training steps and then of evaluations."""
    evaluated = {key: f"{name}, evaluation" for key, name in _names(run, f"eval/{prefix}").items()}
    return _chart(run, title, _names(run, prefix) | evaluated, note, log=log)


def _names(run: RunRecord, prefix: str) -> dict[str, str]:
    """Return the metrics of a run under a prefix, as key -> name."""
    return {
        key: key.removeprefix(prefix) for key in run.metrics() if key.startswith(prefix) and not key.endswith(STDERR)
    }


def _chart(
    run: RunRecord,
    title: str,
    labels: Mapping[str, str],
    note: str = "",
    *,
    error: str = "",
    log: bool = False,
    stacked: bool = False,
    smooth: bool = True,
) -> Chart:
    """Return a chart of the metrics in `labels` that the run has."""
    found = [(key, label) for key, label in labels.items() if key in run.metrics()]
    curves = [_curve(run, key, label, index, error, smooth) for index, (key, label) in enumerate(found)]
    return Chart(title, curves, note, stacked, log)


def _curve(run: RunRecord, key: str, label: str, index: int, error: str = "", smooth: bool = True) -> Curve:
    """Return a curve; evaluations show every point and the band of their standard error."""
    evaluated = key.startswith("eval/")
    return Curve(run, key, label, nth_colour(index), f"{key}{STDERR}" if evaluated else error, evaluated, smooth)
