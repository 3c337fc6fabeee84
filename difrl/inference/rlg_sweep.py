"""`difrl evaluate`: rewards of a finished run against the RLG weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from difrl.config.load import ConfigError
from difrl.data.modality import MODALITIES
from difrl.data.prompts import load_prompts
from difrl.inference.loaded_run import open_run
from difrl.policies.base import TRAINED, GuidanceSettings
from difrl.reporting.html import write_report
from difrl.reporting.inference_defaults import InferenceDefaults
from difrl.reporting.number_format import CLEAR, number, plus_minus
from difrl.reporting.summary import STDERR
from difrl.reporting.sweep_peaks import WATCHED, argmax_known, best_weight_index, watched_series
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.scoring.diversity import Diversity
from difrl.scoring.parse_reward import parse_reward
from difrl.training.evaluation import Evaluator
from difrl.training.run_folder import RunFolderError
from difrl.training.sample_outputs import sweep

BEST = "best"
PEAK = "▲"
SHOWN = ("reward/", "watch/", "diversity/", "divergence/")
HIGHEST = ("reward/", "watch/", "diversity/")
"""Metrics of which more is better."""


def evaluate_run(
    run: Path,
    weights: Sequence[float],
    rewards: Sequence[str],
    images: int,
    steering: GuidanceSettings = TRAINED,
    default: str | None = None,
) -> dict[str, Any]:
    """Evaluates a run at every weight; writes rlg.json, rlg.png and the report into its folder.

    default: a weight that becomes the run's own with these settings, or "best" (difrl/reporting/sweep_peaks.py): inference.json.
    """
    if not (run / "config.yaml").is_file():
        raise RunFolderError(
            f"{run} is no run folder: config.yaml not found in it; give a folder that `difrl train` made"
        )
    processes = DistributedContext()
    opened = open_run(run, device=processes.device)
    config = opened.config
    prompts = config.data.evaluation
    if prompts is None:
        raise ConfigError(f"{run / 'config.yaml'}: data.evaluation is not set, so there are no prompts to evaluate on")
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"rlg": list(weights), "images": images})})
    known = {r.label for r in [*config.rewards, *config.watch]}
    watch = [*config.watch, *(parse_reward(text) for text in rewards if text not in known)]
    if default == BEST and not watch:
        raise ConfigError(
            "--write-default best: the run watches no reward; add one with --rewards, e.g. --rewards judge"
        )
    scorer = Scorer.build(config.rewards, watch, processes.device)
    scorer.check_modality(MODALITIES[config.likelihood.kind])
    diversity = Diversity.build(config.eval.diversity)
    evaluator = Evaluator(opened.policy, scorer, load_prompts(prompts), processes, config.seed, diversity)
    result = sweep(evaluator, config, run, processes, steering)
    if processes.is_main:
        if default is not None:
            _default(result, steering, default).write(run)
        write_report([run], run / "report.html")
    return result


def _default(result: Mapping[str, Any], steering: GuidanceSettings, default: str) -> InferenceDefaults:
    """What `--write-default` asks for, after a sweep."""
    if default == BEST:
        weight, names = result["weights"][best_weight_index(result)], " and ".join(watched_series(result))
        why = f"highest {names} of {len(result['weights'])} weights"
    else:
        weight, why = float(default), "chosen by hand"
    return InferenceDefaults(weight, steering.first_steps, steering.adaptive, why)


def sweep_notes(result: Mapping[str, Any]) -> list[str]:
    """In sentences: where each watched reward is highest, and what adaptive guidance saved."""
    notes = [_peak_note(result, name) for name in watched_series(result)]
    if result.get("adaptive") is not None:
        made, saved = (sum(result[f"cost/{name}"]) / len(result["weights"]) for name in ("evaluations", "saved"))
        notes.append(
            f"adaptive guidance at {result['adaptive']:g} saved {saved:.1f} of {made + saved:.1f} evaluations a sample"
        )
    if result.get("first_steps"):
        notes.append(f"the first {result['first_steps']} steps at w = 1")
    return notes


def _peak_note(result: Mapping[str, Any], name: str) -> str:
    """Where a watched reward is highest, and whether that is clearly above the trained model itself."""
    weights, values, errors = result["weights"], result[WATCHED + name], result[WATCHED + name + STDERR]
    place = argmax_known(values)
    assert place is not None
    note = f"{PEAK} {name} (watched) is highest at w = {weights[place]:g}"
    trained = weights.index(1.0) if 1.0 in weights else None
    if trained in (None, place) or None in (values[trained], errors[trained], errors[place]):
        return note
    if values[place] - values[trained] > CLEAR * math.hypot(errors[place], errors[trained]):
        return note
    return f"{note}, not clearly above w = 1"


def sweep_table(result: Mapping[str, Any], width: int = 80) -> Group:
    """One row a weight, one column a metric, as many tables as `width` asks for.

    The highest reward of a column is bold, that of a watched one also has the mark of its peak.
    """
    shown = SHOWN if result.get("adaptive") is None else (*SHOWN, "cost/")
    names = [n for n in result if n.startswith(shown) and not n.endswith("/stderr")]
    if len([n for n in names if n.startswith("reward/")]) == 2:
        names.remove("reward/mean")
    weights = [f"{weight:g}" for weight in result["weights"]]
    columns = [
        _column("w", weights),
        *(_column(n, [_cell(result, n, row) for row in range(len(weights))]) for n in names),
    ]
    tables: list[list[Column]] = []
    for column in columns[1:]:
        if not tables or _width([*tables[-1], column]) > width:
            tables.append([columns[0]])
        tables[-1].append(column)
    return Group(*(_table(table) for table in tables))


Column = tuple[Text, list[Text]]
GAP = 3


def _column(name: str, cells: Sequence[str]) -> Column:
    """The header, its role in a line of its own, and the cells."""
    role, _, metric = name.rpartition("/")
    return Text(f"{role}\n{metric}"), [Text.from_markup(cell) for cell in cells]


def _width(columns: Sequence[Column]) -> int:
    lines = [[line for text in (head, *cells) for line in text.plain.split("\n")] for head, cells in columns]
    return sum(max(map(cell_len, column)) + GAP for column in lines)


def _table(columns: Sequence[Column]) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0))
    for head, _ in columns:
        table.add_column(head, justify="right", overflow="fold")
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def _cell(result: Mapping[str, Any], name: str, row: int) -> str:
    value, error = result[name][row], result.get(f"{name}/stderr", {})
    if value is None:
        return "-"
    spread = plus_minus(error[row]) if error else ""
    if not name.startswith(HIGHEST) or row != argmax_known(result[name]):
        return f"{number(value)}{spread}"
    mark = f"{PEAK} " if name.startswith(WATCHED) else ""
    return f"{mark}[bold]{number(value)}[/]{spread}"
