"""`difrl evaluate`: the rewards of a finished run at several RLG weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from difrl.config.yaml_source import ConfigError
from difrl.data.modality import find_modality
from difrl.data.prompts import check_images, load_prompts
from difrl.inference.loaded_run import open_run
from difrl.policies.base import TRAINED, GuidanceSettings
from difrl.policies.model_paths import check_run_folder
from difrl.reporting.html import write_report
from difrl.reporting.inference_defaults import InferenceDefaults
from difrl.reporting.number_format import CLEAR, number, plus_minus
from difrl.reporting.summary import STDERR
from difrl.reporting.sweep_peaks import WATCHED_PREFIX, argmax_known, best_weight_index, watched_series
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.scoring.diversity import Diversity
from difrl.scoring.parse_reward import parse_reward
from difrl.training.evaluation import Evaluator
from difrl.training.sample_outputs import run_sweep

BEST = "best"
PEAK = "▲"
COLUMNS = ("reward/", "watch/", "diversity/", "divergence/")
HIGHEST = ("reward/", "watch/", "diversity/")
"""Prefixes of metrics whose highest value is marked."""


def evaluate_run(
    run: Path,
    weights: Sequence[float],
    rewards: Sequence[str],
    images: int,
    guidance: GuidanceSettings = TRAINED,
    default: str | None = None,
) -> dict[str, Any]:
    """Evaluate a run at every RLG weight. Write rlg.json, rlg.png and the report into its folder, and return rlg.json.

    default: the weight of samples drawn later, or "best" (difrl/reporting/sweep_peaks.py). It is written to inference.json with
    the settings of `guidance`. None: inference.json stays as it is.
    """
    check_run_folder(run)
    processes = DistributedContext()
    loaded = open_run(run, device=processes.device)
    config, prompts = loaded.config, loaded.config.data.evaluation
    if prompts is None:
        raise ConfigError(f"{run / 'config.yaml'}: data.evaluation is not set, so there are no prompts to evaluate on")
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"rlg": list(weights), "images": images})})
    labels = {r.label for r in [*config.rewards, *config.watch]}
    watch = [*config.watch, *(parse_reward(text) for text in rewards if text not in labels)]
    if default == BEST and not watch:
        raise ConfigError(
            "--write-default best: the run watches no reward; add one with --rewards, e.g. --rewards judge"
        )
    modality = find_modality(config)
    chosen = load_prompts(prompts, images=modality.takes_images)
    check_images(chosen)
    scorer = Scorer.build(config.rewards, watch, processes.device, modality)
    scorer.preload()
    diversity = Diversity.build(config.eval.diversity)
    evaluator = Evaluator(loaded.policy, scorer, chosen, processes, config.seed, diversity)
    result = run_sweep(evaluator, config, run, guidance)
    if processes.is_main:
        if default is not None:
            _choose_default(result, guidance, default).write(run)
        write_report([run], run / "report.html")
    return result


def _choose_default(result: Mapping[str, Any], guidance: GuidanceSettings, default: str) -> InferenceDefaults:
    if default == BEST:
        weight, names = result["weights"][best_weight_index(result)], " and ".join(watched_series(result))
        why = f"highest {names} of {len(result['weights'])} weights"
    else:
        weight, why = float(default), "chosen by hand"
    return InferenceDefaults(weight, guidance.first_steps, guidance.adaptive, why)


def sweep_notes(result: Mapping[str, Any]) -> list[str]:
    """Return sentences on the peak of each watched reward, and on the evaluations that adaptive guidance saved."""
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
    """Return a sentence on the highest value of a watched reward, and on its distance from the trained model's."""
    weights, values, errors = result["weights"], result[WATCHED_PREFIX + name], result[WATCHED_PREFIX + name + STDERR]
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
    """Return tables with a row for each weight and a column for each metric, as many as `width` makes necessary.

    The highest value of a column is bold. That of a watched reward also has a mark.
    """
    prefixes = COLUMNS if result.get("adaptive") is None else (*COLUMNS, "cost/")
    names = [n for n in result if n.startswith(prefixes) and not n.endswith("/stderr")]
    if len([n for n in names if n.startswith("reward/")]) == 2:
        names.remove("reward/mean")
    weights = [f"{weight:g}" for weight in result["weights"]]
    first = _build_column("w", weights)
    tables: list[list[TableColumn]] = []
    for name in names:
        column = _build_column(name, [_format_cell(result, name, row) for row in range(len(weights))])
        if not tables or _width([*tables[-1], column]) > width:
            tables.append([first])
        tables[-1].append(column)
    return Group(*(_build_table(columns) for columns in tables))


TableColumn = tuple[Text, list[Text]]
GAP = 3


def _build_column(name: str, cells: Sequence[str]) -> TableColumn:
    """Return the heading, with the metric's group in a line of its own, and the cells."""
    group, _, metric = name.rpartition("/")
    return Text(f"{group}\n{metric}"), [Text.from_markup(cell) for cell in cells]


def _width(columns: Sequence[TableColumn]) -> int:
    lines = [[line for text in (head, *cells) for line in text.plain.split("\n")] for head, cells in columns]
    return sum(max(map(cell_len, column)) + GAP for column in lines)


def _build_table(columns: Sequence[TableColumn]) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0))
    for head, _ in columns:
        table.add_column(head, justify="right", overflow="fold")
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def _format_cell(result: Mapping[str, Any], name: str, row: int) -> str:
    value, error = result[name][row], result.get(f"{name}/stderr", {})
    if value is None:
        return "-"
    spread = plus_minus(error[row]) if error else ""
    if not name.startswith(HIGHEST) or row != argmax_known(result[name]):
        return f"{number(value)}{spread}"
    mark = f"{PEAK} " if name.startswith(WATCHED_PREFIX) else ""
    return f"{mark}[bold]{number(value)}[/]{spread}"
