"""The parts of a run's page, each a function from the run to HTML, empty where there is nothing to show."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

from difrl.reporting import number_format as formats
from difrl.reporting.html.charts import Line, line_chart, sparkline
from difrl.reporting.html.figures import figure, smoothing_note, training_figure
from difrl.reporting.html.glossary import definition
from difrl.reporting.html.image_frames import Frame, Picture
from difrl.reporting.html.panels import COLOURS, other_charts, spoken, training_charts
from difrl.reporting.html.read_run import RunRecord, Sweep
from difrl.reporting.html.text_tables import over_training, side_by_side
from difrl.reporting.inference_defaults import Chosen
from difrl.reporting.summary import STDERR, Change, suspicious
from difrl.reporting.sweep_peaks import WATCHED, peak

VERDICT = {1: "rose", 0: "no clear change", -1: "fell"}
TONE = {1: "up", 0: "even", -1: "down"}
ERRORS_NOTE = "Measured on evaluation prompts, which are never trained on; ± one standard error."
ROLLOUT_NOTE = (
    "Mean over the first and the last tenth of the steps, on training prompts: this run has no two "
    "evaluations to compare."
)
SAMPLES_NOTE = "The same prompts and noise at every step."
COSTS = ("cost/evaluations", "cost/saved")
SWEEP_NOTE = (
    "Every sample is drawn with base + w · (trained − base); w = 0 is the base model, w = 1 the trained one; "
    "a ring marks the highest value of a watched reward."
)


def section(title: str, body: str, aside: str = "") -> str:
    return f'<section><div class="bar"><h2>{title}</h2>{aside}</div>{body}</section>'


def note(text: str) -> str:
    return f'<p class="note">{text}</p>' if text else ""


def problems(run: RunRecord) -> str:
    if not run.problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    return f'<aside class="problems"><h2>Worth knowing about this run folder</h2><ul>{items}</ul></aside>'


def headline(run: RunRecord) -> str:
    """Before → after of every measure on evaluation prompts; without two evaluations, the ends of the rollout reward."""
    found = run.changes()
    if not found:
        return _rollout_headline(run)
    fell = " and ".join(escape(change.label) for change in suspicious(found))
    warning = f"{fell} fell while the trained reward rose: look at the samples below." if fell else ""
    cards = "".join(_change_card(run, change) for change in found)
    told = [one for one in (warning, escape(str(run.summary.get("guard") or ""))) if one]
    return _headline(cards, "".join(f'<p class="warning">{one}</p>' for one in told), ERRORS_NOTE)


def _headline(cards: str, warning: str, small: str) -> str:
    return f'<section class="headline"><div class="cards">{cards}</div>{warning}{note(small)}</section>'


def _change_card(run: RunRecord, change: Change) -> str:
    spread = f" ± {formats.number(change.stderr)}" if math.isfinite(change.stderr) else ""
    return _card(
        change.role,
        change.name,
        (change.before, change.after, change.after_stderr),
        f"{formats.signed(change.difference)}{spread}<span>{VERDICT[change.direction]}</span>",
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
    before, after, error = values
    small = f"<small>± {formats.number(error)}</small>" if math.isfinite(error) else ""
    value = f"<span>{formats.number(before)}</span><span>→</span><b>{formats.number(after)}</b>{small}"
    return (
        f'<div class="card {role}" tabindex="0" data-tip="{escape(tip, quote=True)}">'
        f'<p class="role">{role}</p><h3>{escape(name)}</h3><p class="value">{value}</p>'
        f'<p class="change {tone}">{change}</p>{sparkline(history)}</div>'
    )


def _rollout_headline(run: RunRecord) -> str:
    values = run.series("reward/mean", "step")[1]
    if not values:
        return ""
    part = max(1, len(values) // 10)
    before, after = formats.mean(values[:part]), formats.mean(values[-part:])
    change, tip = formats.signed(after - before), definition("reward/mean")
    card = _card("rollouts", "reward", (before, after, math.nan), change, "even", values, tip)
    return _headline(card, "", ROLLOUT_NOTE)


def curves(run: RunRecord) -> str:
    """Every chart, with a switch for the horizontal axis, and the remaining metrics folded away."""
    charts = training_charts(run)
    figures = "".join(training_figure(chart, run.nfe_name) for chart in charts)
    if not figures:
        return ""
    rest = "".join(training_figure(chart, run.nfe_name) for chart in other_charts(run))
    folded = f'<details class="more"><summary>Other metrics</summary><div class="charts">{rest}</div></details>'
    body = f'<div class="charts">{figures}</div>{note(smoothing_note(charts))}{folded if rest else ""}'
    return section("Training", body, axis_switch(run.nfe_name))


def axis_switch(nfe_name: str) -> str:
    buttons = "".join(
        f'<button type="button" data-set-axis="{axis}" aria-pressed="{str(axis == "step").lower()}">'
        f"{escape(label)}</button>"
        for axis, label in (("step", "steps"), ("nfe", nfe_name), ("minutes", "minutes"))
    )
    return f'<div class="switch" role="group" aria-label="horizontal axis">{buttons}</div>'


def samples(run: RunRecord) -> str:
    """Texts: a table. Images: the grids as a film with a slider; without a script all show, on paper both ends."""
    if run.written:
        return section("Samples through training", over_training(run.written) + note(SAMPLES_NOTE))
    if not run.frames:
        return ""
    last = len(run.frames) - 1
    pictures = "".join(_frame(frame, index in (0, last)) for index, frame in enumerate(run.frames))
    controls = (
        '<div class="controls"><button type="button" class="play" aria-label="play">▶</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="training step">'
        f'<button type="button" class="first">hold to see step {run.frames[0].step}</button></div>'
    )
    film = f'<div class="film">{controls if last else ""}{pictures}</div>'
    return section("Samples through training", film + note(SAMPLES_NOTE))


def _frame(frame: Frame, end: bool) -> str:
    score = f" · mean score <b>{formats.number(frame.score)}</b>" if math.isfinite(frame.score) else ""
    alt = f"Samples at step {frame.step}" + (f" for: {'; '.join(frame.prompts)}" if frame.prompts else "")
    caption = f"<figcaption>step <b>{frame.step}</b>{score}</figcaption>"
    return f'<figure class="frame{" end" if end else ""}">{caption}{picture(frame.picture, alt)}</figure>'


def picture(one: Picture, alt: str) -> str:
    """Scrolls sideways on a narrow screen, and at full size after a click, so that captions stay legible."""
    return (
        f'<div class="sheet"><img src="{one.uri}" width="{one.width}" height="{one.height}" '
        f'alt="{escape(alt, quote=True)}"></div>'
    )


def sweep(run: RunRecord) -> str:
    """Rewards, distance to the base, and what else was measured, against the RLG weight, with the picture of the sweep."""
    one = run.sweep
    if one is None:
        return ""
    keys = [key for key in one.series if not key.endswith(STDERR) and not key.startswith("cost/")]
    keys = [key for key in keys if not _repeats(one, key)]
    rewards = [key for key in keys if key.removeprefix("eval/").startswith(("reward/", "watch/"))]
    marks = _weights_to_mark(run.chosen)
    figures = _sweep_figure(one, "Rewards", rewards, marks)
    figures += "".join(_sweep_figure(one, spoken(key), [key], marks) for key in keys if key not in rewards)
    if one.adaptive is not None:
        costs = [key for key in one.series if key in COSTS]
        figures += _sweep_figure(one, "Evaluations a sample", costs, marks)
    shown = picture(one.picture, "Samples at each RLG weight") if one.picture else ""
    shown += side_by_side(one.written) if one.written else ""
    lead = f'<p class="lead">{_peaks(one, rewards)}{_default(run.chosen)}</p><div class="charts">{figures}</div>'
    return section("RLG: turning the training up and down", lead + shown + note(SWEEP_NOTE + _settings_of(one)))


def _weights_to_mark(chosen: Chosen | None) -> list[tuple[float, str]]:
    """Vertical rules of a sweep: base, trained, and the run's default, which may be one of them."""
    marks = {0.0: "base", 1.0: "trained"}
    if chosen is not None:
        marks[chosen.rlg] = ", ".join(filter(None, (marks.get(chosen.rlg), "default")))
    return list(marks.items())


def _default(chosen: Chosen | None) -> str:
    if chosen is None:
        return ""
    return f" The run is sampled at w = {chosen.rlg:g} by default ({escape(chosen.why or 'as inference.json says')})."


def _settings_of(one: Sweep) -> str:
    first = f" The first {one.first_steps} steps are at w = 1." if one.first_steps else ""
    adaptive = "" if one.adaptive is None else f" Adaptive guidance ended at a cosine of {one.adaptive:g}."
    return first + adaptive


def _repeats(one: Sweep, key: str) -> bool:
    """The mean over rewards, where there is only one."""
    prefix, _, name = key.rpartition("/")
    return name == "mean" and any(
        other != key and other.startswith(f"{prefix}/") and values == one.series[key]
        for other, values in one.series.items()
    )


def _sweep_figure(one: Sweep, title: str, keys: list[str], marks: Sequence[tuple[float, str]]) -> str:
    lines = [
        Line(
            key,
            _short(key),
            one.weights,
            one.series[key],
            index % COLOURS + 1,
            one.series.get(key + STDERR, []),
            True,
            ringed=peak(one.series[key]) if key.removeprefix("eval/").startswith(WATCHED) else None,
        )
        for index, key in enumerate(keys)
    ]
    svg = line_chart(lines, "RLG weight w", marks=marks)
    return figure(title, lines, svg, values=False) if svg else ""


def _short(key: str) -> str:
    kind, _, name = key.removeprefix("eval/").partition("/")
    return f"{name} (watched)" if kind == "watch" else name or kind


def _peaks(one: Sweep, keys: list[str]) -> str:
    parts = []
    for key in keys:
        place = peak(one.series[key])
        if place is not None:
            value, weight = one.series[key][place], one.weights[place]
            parts.append(f"{escape(_short(key))} is highest at w = {weight:g} (<b>{formats.number(value)}</b>)")
    return "; ".join(parts) + "." if parts else ""


def settings(run: RunRecord) -> str:
    if not run.config_text:
        return ""
    return (
        '<section><details class="config"><summary><h2>Settings</h2>'
        "<span>config.yaml, expanded</span></summary>"
        f"<pre>{_coloured(run.config_text)}</pre></details></section>"
    )


def _coloured(text: str) -> str:
    """Keys and comments of YAML, which is all the colour a config needs."""
    lines = []
    for line in text.splitlines():
        safe = escape(line, quote=False)
        if safe.lstrip().startswith("#"):
            lines.append(f'<span class="comment">{safe}</span>')
        else:
            lines.append(re.sub(r"^(\s*(?:- )*)([\w./-]+)(:)(?=\s|$)", r'\1<span class="key">\2</span>\3', safe))
    return "\n".join(lines)
