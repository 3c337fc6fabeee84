"""The texts of a run folder: read from the JSON of its sheets, shown as tables of prompts and completions."""

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
from difrl.reporting.html.charts import sparkline

STEP = re.compile(r"step-(\d+)\.json$")
SHOWN = 4
"""Completions of a prompt that a cell shows."""


@dataclass(frozen=True)
class Completions:
    """Of P prompts, in one way to draw them."""

    label: str
    texts: list[list[str]]
    """[P][N]."""
    scores: list[list[float]]
    """[P][N], NaN where nothing scored the text."""

    def mean(self, row: int) -> float:
        """Of the scores of a prompt's completions."""
        known = [score for score in self.scores[row] if math.isfinite(score)]
        return formats.mean(known) if known else math.nan


@dataclass(frozen=True)
class Written:
    """A sheet of texts."""

    prompts: list[str]
    sets: list[Completions]
    step: int = 0


def read_written(folder: Path, problems: list[str]) -> list[Written]:
    """The sheets of a run's steps, in order. Files of pictures are left alone."""
    found = []
    for path in sorted(folder.glob("step-*.json")):
        match = STEP.search(path.name)
        if match is None or path.with_suffix(".png").exists():
            continue
        try:
            sheet = written(json.loads(path.read_text(encoding="utf-8")), int(match[1]))
        except (OSError, ValueError):
            sheet = None
        if sheet is None:
            problems.append(f"{path.name} is not what was expected of a sheet of texts; it is left out.")
        else:
            found.append(sheet)
    first = found[0].prompts if found else []
    return [sheet for sheet in found if sheet.prompts == first]


def written(value: Any, step: int = 0) -> Written | None:
    """What TextSheet.described() says; None if it is something else, a sheet of pictures for instance."""
    try:
        prompts = [str(prompt) for prompt in value["prompts"]]
        sets = [_completions(one, len(prompts)) for one in value["sets"]]
    except (KeyError, TypeError, ValueError):
        return None
    return Written(prompts, sets, step) if prompts and sets else None


def _completions(value: Any, count: int) -> Completions:
    texts = [[str(text) for text in row] for row in value["texts"]]
    said = value["scores"] or [[None] * len(row) for row in texts]
    scores = [[math.nan if score is None else float(score) for score in row] for row in said]
    if [len(row) for row in texts] != [len(row) for row in scores] or len(texts) != count:
        raise ValueError("scores that do not belong to the texts")
    return Completions(str(value["label"]), texts, scores)


def over_training(sheets: Sequence[Written]) -> str:
    """A row a prompt: what the model wrote before training and after it, and the mean reward of both and in between."""
    first, last = sheets[0], sheets[-1]
    same = first is last
    heads = (
        ["prompt", f"step {last.step}", "reward"]
        if same
        else ["prompt", *(f"step {s.step}" for s in (first, last)), "reward"]
    )
    rows = []
    for row, prompt in enumerate(last.prompts):
        cells = [_cell(sheet.sets[0], row) for sheet in ([last] if same else [first, last])]
        rows.append([_prompt(prompt), *cells, _history([sheet.sets[0].mean(row) for sheet in sheets])])
    return _table(heads, rows)


def side_by_side(sheet: Written) -> str:
    """A row a prompt, a column a set."""
    rows = [[_prompt(prompt), *(_cell(one, row) for one in sheet.sets)] for row, prompt in enumerate(sheet.prompts)]
    return _table(["prompt", *(one.label for one in sheet.sets)], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="texts"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _prompt(text: str) -> str:
    return f"<b>{escape(text)}</b>"


def _cell(one: Completions, row: int) -> str:
    pairs = list(zip(one.texts[row], one.scores[row], strict=True))
    more = f"<p><small>and {len(pairs) - SHOWN} more</small></p>" if len(pairs) > SHOWN else ""
    return "".join(_completion(text, score) for text, score in pairs[:SHOWN]) + more


def _completion(text: str, score: float) -> str:
    known = f"<small>{formats.number(score)}</small>" if math.isfinite(score) else ""
    return f"<p><q>{escape(text) if text else '<i>empty</i>'}</q>{known}</p>"


def _history(means: Sequence[float]) -> str:
    known = [mean for mean in means if math.isfinite(mean)]
    if not known:
        return ""
    ends = (
        f"{formats.number(known[0])} → <b>{formats.number(known[-1])}</b>"
        if known[1:]
        else f"<b>{formats.number(known[0])}</b>"
    )
    return f"{ends}{sparkline(means)}"
