"""The whole page: headline, curves, pictures, sweep, settings and glossary."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from difrl.reporting import number_format as formats
from difrl.reporting.html import sections
from difrl.reporting.html.compare import comparison
from difrl.reporting.html.glossary import entries
from difrl.reporting.html.read_run import RunRecord


def render_page(runs: Sequence[RunRecord]) -> str:
    """Return an HTML document. Runs of the same name also show the name of their parent folder."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.name}"
    title = " · ".join(run.name for run in runs) if len(runs) <= 3 else f"{len(runs)} runs"
    if len(runs) > 1:
        body = comparison(runs)
        for run in runs:
            body += (
                f'<details class="run" id="run-{escape(run.name, quote=True)}"><summary>'
                f"<h2>{escape(run.name)}</h2></summary>{_facts(run)}{_parts(run)}</details>"
            )
    else:
        (run,) = runs
        name = f'<p class="kicker">difrl run</p><h1>{escape(run.name)}</h1>'
        body = f"<header>{name}{_facts(run)}</header>{_parts(run)}"
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · difrl</title><style>{style}</style></head>"
        f'<body data-axis="step"><main>{body}{_glossary(runs)}</main>'
        f'<div id="tip" role="tooltip" hidden></div><script>{script}</script></body></html>\n'
    )


def _parts(run: RunRecord) -> str:
    parts = (
        sections.render_problems,
        sections.render_headline,
        sections.render_samples,
        sections.render_curves,
        sections.render_sweep,
        sections.render_settings,
    )
    return "".join(part(run) for part in parts)


def _facts(run: RunRecord) -> str:
    """Return a line of small facts: algorithm, model, steps done and cost."""
    model = run.settings("model")
    trained = str(model.get("train", ""))
    facts = [
        run.config.get("algorithm"),
        model.get("path"),
        {"lora": "LoRA", "full": "all weights"}.get(trained, trained),
    ]
    steps = int(run.rows[-1]["step"]) if run.rows else 0
    planned = run.planned_steps
    facts.append(f"{steps} of {planned} steps" if planned and planned != steps else formats.pluralise(steps, "step"))
    if run.rows and run.rows[-1]["nfe"] > 0:
        facts.append(f"{formats.count(run.rows[-1]['nfe'])} {run.nfe_name}")
    if run.rows and run.rows[-1]["minutes"] > 0:
        facts.append(f"{formats.duration(run.rows[-1]['minutes'] * 60)} of training")
    return f"<p class='facts'>{''.join(f'<span>{escape(str(fact))}</span>' for fact in facts if fact)}</p>"


def _glossary(runs: Sequence[RunRecord]) -> str:
    keys = ["step", "nfe", *(key for run in runs for key in run.metrics())]
    for one in filter(None, (run.sweep for run in runs)):
        keys += ["rlg weight", *(key for key in one.series if key.startswith(("divergence/", "cost/")))]
    items = "".join(
        f"<div><dt><code>{escape(pattern)}</code></dt><dd>{escape(text)}</dd></div>" for pattern, text in entries(keys)
    )
    return f'<section class="glossary"><h2>Definitions</h2><dl>{items}</dl></section>'
