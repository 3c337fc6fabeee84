"""Texts of a run folder, read from the JSON of its sheets and shown as tables of prompts and completions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from difrl.reporting import number_format as formats
from difrl.reporting.html.charts import render_sparkline

STEP_TEXTS = re.compile(r"step-(\d+)\.json$")
SHOWN_TEXTS = 4
"""Number of completions that a cell shows."""


@dataclass(frozen=True)
class CompletionSet:
    """Completions of P prompts, drawn in one way."""

    label: str
    texts: list[list[str]]
    """[P][N]."""
    scores: list[list[float]]
    """[P][N], NaN for a text that was not scored."""


@dataclass(frozen=True)
class TextSamples:
    """Texts of one step, or of the weights of a sweep."""

    prompts: list[str]
    sets: list[CompletionSet]
    step: int = 0


def read_text_samples(folder: Path, problems: list[str]) -> list[TextSamples]:
    """Return the texts of a run's steps, in order. Files that belong to pictures are left out."""
    found = []
    for path in sorted(folder.glob("step-*.json")):
        match = STEP_TEXTS.search(path.name)
        if match is None or path.with_suffix(".png").exists():
            continue
        try:
            samples = parse_text_samples(json.loads(path.read_text(encoding="utf-8")), int(match[1]))
        except (OSError, ValueError):
            samples = None
        if samples is None:
            problems.append(f"{path.name} is not a valid sheet of texts; it is left out.")
        else:
            found.append(samples)
    return [samples for samples in found if samples.prompts == found[0].prompts]


def parse_text_samples(value: Any, step: int = 0) -> TextSamples | None:
    """Return the samples that `TextSheet.described` wrote, None for anything else, such as a sheet of pictures."""
    try:
        prompts = [str(prompt) for prompt in value["prompts"]]
        sets = [_parse_completions(one, len(prompts)) for one in value["sets"]]
    except (KeyError, TypeError, ValueError):
        return None
    return TextSamples(prompts, sets, step) if prompts and sets else None


def _parse_completions(value: Any, count: int) -> CompletionSet:
    texts = [[str(text) for text in row] for row in value["texts"]]
    scores = value["scores"] or [[None] * len(row) for row in texts]
    numbers = [[math.nan if score is None else float(score) for score in row] for row in scores]
    if [len(row) for row in texts] != [len(row) for row in numbers] or len(texts) != count:
        raise ValueError("scores that do not belong to the texts")
    return CompletionSet(str(value["label"]), texts, numbers)


def over_training(steps: Sequence[TextSamples]) -> str:
    """Return one row for each prompt: completions of the first and the last step, and the mean reward of every step."""
    shown = [steps[0], steps[-1]] if len(steps) > 1 else list(steps)
    rows = []
    for row, prompt in enumerate(steps[-1].prompts):
        rewards = _rewards([formats.mean_of_finite(samples.sets[0].scores[row]) for samples in steps])
        rows.append([prompt, *(_cell(samples.sets[0], row) for samples in shown), rewards])
    return _table(["prompt", *(f"step {samples.step}" for samples in shown), "reward"], rows)


def side_by_side(samples: TextSamples) -> str:
    """Return a row a prompt, a column a set."""
    rows = [[prompt, *(_cell(one, row) for one in samples.sets)] for row, prompt in enumerate(samples.prompts)]
    return _table(["prompt", *(one.label for one in samples.sets)], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table. The first cell of a row is a prompt, the others are HTML."""
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body = ""
    for prompt, *cells in rows:
        body += f"<tr><td><b>{escape(prompt)}</b></td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return f'<div class="scroll"><table class="texts"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(completions: CompletionSet, row: int) -> str:
    pairs = list(zip(completions.texts[row], completions.scores[row], strict=True))
    cell = ""
    for text, score in pairs[:SHOWN_TEXTS]:
        small = f"<small>{formats.number(score)}</small>" if math.isfinite(score) else ""
        cell += f"<p><q>{escape(text) if text else '<i>empty</i>'}</q>{small}</p>"
    return cell + (f"<p><small>and {len(pairs) - SHOWN_TEXTS} more</small></p>" if len(pairs) > SHOWN_TEXTS else "")


def _rewards(means: Sequence[float]) -> str:
    finite = [formats.number(mean) for mean in means if math.isfinite(mean)]
    if not finite:
        return ""
    first = f"{finite[0]} → " if len(finite) > 1 else ""
    return f"{first}<b>{finite[-1]}</b>{render_sparkline(means)}"
