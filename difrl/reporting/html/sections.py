"""Parts of the page of a run, each a function from the run to HTML, which is empty if there is nothing to show."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from html import escape

from difrl.reporting import number_format as formats
from difrl.reporting.html.charts import Line, line_chart, render_sparkline
from difrl.reporting.html.figures import figure, smoothing_note, training_figure
from difrl.reporting.html.glossary import definition
from difrl.reporting.html.image_frames import Picture
from difrl.reporting.html.panels import metric_title, nth_colour, other_charts, training_charts
from difrl.reporting.html.read_run import RunRecord, Sweep
from difrl.reporting.html.text_tables import over_training, side_by_side
from difrl.reporting.summary import STDERR, Change, suspicious
from difrl.reporting.sweep_peaks import WATCHED_PREFIX, argmax_known

VERDICT = {1: "rose", 0: "no clear change", -1: "fell"}
TONE = {1: "up", 0: "even", -1: "down"}
ERRORS_NOTE = "Measured on evaluation prompts, which are never trained on; ± one standard error."
ROLLOUT_NOTE = (
    "Mean over the first and the last tenth of the steps, on training prompts: this run has no two "
    "evaluations to compare."
)
SAMPLES_NOTE = "The same prompts and noise at every step."
MOVING = "screen and (prefers-reduced-motion: no-preference)"
"""Media in which videos play."""
COSTS = ("cost/evaluations", "cost/saved")
SWEEP_NOTE = (
    "Every sample is drawn with base + w · (trained − base): w = 0 is the base model, w = 1 the trained model. "
    "A ring marks the highest value of a watched reward."
)


def section(title: str, body: str, aside: str = "") -> str:
    """Return a section with a heading and an element at its right."""
    return f'<section><div class="bar"><h2>{title}</h2>{aside}</div>{body}</section>'


def note(text: str) -> str:
    """Return a paragraph of small text."""
    return f'<p class="note">{text}</p>' if text else ""


def render_problems(run: RunRecord) -> str:
    """Return the list of problems of the run folder."""
    if not run.problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    return f'<aside class="problems"><h2>Worth knowing about this run folder</h2><ul>{items}</ul></aside>'


def render_headline(run: RunRecord) -> str:
    """Return before → after of every metric on evaluation prompts.

    Without two evaluations, return the reward of the first and the last tenth of the steps.
    """
    found = run.changes()
    if found:
        fell = " and ".join(escape(change.label) for change in suspicious(found))
        warnings = [
            f"{fell} fell while the trained reward rose: look at the samples below." if fell else "",
            escape(str(run.summary.get("guard") or "")),
        ]
        cards = "".join(_change_card(run, change) for change in found)
        below = "".join(f'<p class="warning">{one}</p>' for one in warnings if one) + note(ERRORS_NOTE)
    elif values := run.series("reward/mean", "step")[1]:
        part = max(1, len(values) // 10)
        before, after = formats.mean_of_finite(values[:part]), formats.mean_of_finite(values[-part:])
        small = formats.signed(after - before)
        cards = _card("rollouts", "reward", (before, after, math.nan), small, "even", values, definition("reward/mean"))
        below = note(ROLLOUT_NOTE)
    else:
        return ""
    return f'<section class="headline"><div class="cards">{cards}</div>{below}</section>'


def _change_card(run: RunRecord, change: Change) -> str:
    return _card(
        change.role,
        change.name,
        (change.before, change.after, change.after_stderr),
        f"{formats.signed(change.difference)}{formats.plus_minus(change.stderr)}<span>{VERDICT[change.direction]}</span>",
        TONE[change.direction],
        run.series(change.key, "step")[1],
        definition(change.key),
    )


def _card(
    role: str,
    name: str,
    values: tuple[float, float, float],
    change: str,
    tone: str,
    history: list[float],
    tip: str,
) -> str:
    """Return the card of one metric; `values` are before, after and the standard error of after."""
    before, after, error = values
    small = f"<small>{formats.plus_minus(error).strip()}</small>" if math.isfinite(error) else ""
    value = f"<span>{formats.number(before)}</span><span>→</span><b>{formats.number(after)}</b>{small}"
    return (
        f'<div class="card {role}" tabindex="0" data-tip="{escape(tip, quote=True)}">'
        f'<p class="role">{role}</p><h3>{escape(name)}</h3><p class="value">{value}</p>'
        f'<p class="change {tone}">{change}</p>{render_sparkline(history)}</div>'
    )


def render_curves(run: RunRecord) -> str:
    """Return all charts, with a switch for the horizontal axis. Charts of further metrics are folded away."""
    charts = training_charts(run)
    figures = "".join(training_figure(chart, run.nfe_name) for chart in charts)
    if not figures:
        return ""
    rest = "".join(training_figure(chart, run.nfe_name) for chart in other_charts(run))
    folded = f'<details class="more"><summary>Other metrics</summary><div class="charts">{rest}</div></details>'
    body = f'<div class="charts">{figures}</div>{note(smoothing_note(charts))}{folded if rest else ""}'
    return section("Training", body, axis_switch(run.nfe_name))


def axis_switch(nfe_name: str) -> str:
    """Return buttons for the horizontal axis of all charts."""
    buttons = "".join(
        f'<button type="button" data-set-axis="{axis}" aria-pressed="{str(axis == "step").lower()}">'
        f"{escape(label)}</button>"
        for axis, label in (("step", "steps"), ("nfe", nfe_name), ("minutes", "minutes"))
    )
    return f'<div class="switch" role="group" aria-label="horizontal axis">{buttons}</div>'


def render_samples(run: RunRecord) -> str:
    """Return a table of texts, or the image grids with a slider over the steps.

    Without a script every grid is shown; on paper, the first and the last.
    """
    if run.texts:
        return section("Samples through training", over_training(run.texts) + note(SAMPLES_NOTE))
    if not run.frames:
        return ""
    last = len(run.frames) - 1
    controls = (
        '<div class="controls"><button type="button" class="play" aria-label="play">▶</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="training step">'
        f'<button type="button" class="first">hold to see step {run.frames[0].step}</button></div>'
    )
    film = controls if last else ""
    for index, frame in enumerate(run.frames):
        score = f" · mean score <b>{formats.number(frame.score)}</b>" if math.isfinite(frame.score) else ""
        alt = f"Samples at step {frame.step}" + (f" for: {'; '.join(frame.prompts)}" if frame.prompts else "")
        film += (
            f'<figure class="frame{" end" if index in (0, last) else ""}"><figcaption>step <b>{frame.step}</b>{score}'
            f"</figcaption>{picture(frame.picture, alt)}</figure>"
        )
    return section("Samples through training", f'<div class="film">{film}</div>' + note(SAMPLES_NOTE))


def picture(one: Picture, alt: str) -> str:
    """Return a picture. It scrolls on a narrow screen and has full size after a click, so captions stay legible.

    Videos play on a screen, unless its user asks for less motion. On paper they are strips.
    """
    image = f'<img src="{one.uri}" width="{one.width}" height="{one.height}" alt="{escape(alt, quote=True)}">'
    if one.playing is None:
        return f'<div class="sheet">{image}</div>'
    source = f'<source media="{MOVING}" srcset="{one.playing.uri}" width="{one.playing.width}" height="{one.playing.height}">'
    return f'<div class="sheet"><picture>{source}{image}</picture></div>'


def render_sweep(run: RunRecord) -> str:
    """Return rewards, divergences and costs against the RLG weight, with the samples of the sweep."""
    found, default = run.sweep, run.defaults
    if found is None:
        return ""
    keys = [key for key in found.series if not key.endswith(STDERR) and not key.startswith("cost/")]
    keys = [key for key in keys if not _is_mean_of_one(found, key)]
    rewards = [key for key in keys if key.removeprefix("eval/").startswith(("reward/", "watch/"))]
    marks = {0.0: "base", 1.0: "trained"}
    lead = _describe_peaks(found, rewards)
    if default is not None:
        marks[default.rlg] = ", ".join(filter(None, (marks.get(default.rlg), "default")))
        why = escape(default.why or "set in inference.json")
        lead += f" The run is sampled at w = {default.rlg:g} by default ({why})."
    figures = _sweep_figure(found, "Rewards", rewards, marks)
    figures += "".join(_sweep_figure(found, metric_title(key), [key], marks) for key in keys if key not in rewards)
    below = SWEEP_NOTE
    if found.first_steps:
        below += f" The first {found.first_steps} steps are at w = 1."
    if found.adaptive is not None:
        figures += _sweep_figure(found, "Evaluations a sample", [key for key in found.series if key in COSTS], marks)
        below += f" Adaptive guidance ended at a cosine of {found.adaptive:g}."
    shown = picture(found.picture, "Samples at each RLG weight") if found.picture else ""
    shown += side_by_side(found.texts) if found.texts else ""
    charts = f'<p class="lead">{lead}</p><div class="charts">{figures}</div>'
    return section("RLG: turning the training up and down", charts + shown + note(below))


def _is_mean_of_one(sweep: Sweep, key: str) -> bool:
    """Return whether this is the mean over rewards of a sweep that has only one reward."""
    prefix, _, name = key.rpartition("/")
    return name == "mean" and any(
        other != key and other.startswith(f"{prefix}/") and values == sweep.series[key]
        for other, values in sweep.series.items()
    )


def _sweep_figure(sweep: Sweep, title: str, keys: list[str], marks: Mapping[float, str]) -> str:
    lines = [
        Line(
            key,
            _label(key),
            sweep.weights,
            sweep.series[key],
            nth_colour(index),
            sweep.series.get(key + STDERR, []),
            True,
            ringed=argmax_known(sweep.series[key]) if key.removeprefix("eval/").startswith(WATCHED_PREFIX) else None,
        )
        for index, key in enumerate(keys)
    ]
    svg = line_chart(lines, "RLG weight w", marks=list(marks.items()))
    return figure(title, lines, svg, values=False) if svg else ""


def _label(key: str) -> str:
    kind, _, name = key.removeprefix("eval/").partition("/")
    return f"{name} (watched)" if kind == "watch" else name or kind


def _describe_peaks(sweep: Sweep, keys: list[str]) -> str:
    parts = []
    for key in keys:
        index = argmax_known(sweep.series[key])
        if index is not None:
            value, weight = formats.number(sweep.series[key][index]), sweep.weights[index]
            parts.append(f"{escape(_label(key))} is highest at w = {weight:g} (<b>{value}</b>)")
    return "; ".join(parts) + "." if parts else ""


def render_settings(run: RunRecord) -> str:
    """Return config.yaml with its keys and comments coloured."""
    if not run.config_text:
        return ""
    lines = []
    for line in run.config_text.splitlines():
        safe = escape(line, quote=False)
        if safe.lstrip().startswith("#"):
            lines.append(f'<span class="comment">{safe}</span>')
        else:
            lines.append(re.sub(r"^(\s*(?:- )*)([\w./-]+)(:)(?=\s|$)", r'\1<span class="key">\2</span>\3', safe))
    text = "\n".join(lines)
    return (
        '<section><details class="config"><summary><h2>Settings</h2>'
        "<span>config.yaml, expanded</span></summary>"
        f"<pre>{text}</pre></details></section>"
    )
