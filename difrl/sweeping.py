"""`difrl evaluate`: rewards of a finished run against the RLG weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from difrl.config import RewardConfig
from difrl.data import load_prompts
from difrl.evaluation import Evaluator
from difrl.formats import number
from difrl.inference import open_run
from difrl.processes import Processes
from difrl.reading import ConfigError
from difrl.report import write_report
from difrl.running import RunFolderError, sweep
from difrl.scoring import Scorer


def evaluate_run(run: Path, weights: Sequence[float], rewards: Sequence[str], images: int) -> dict[str, Any]:
    """Evaluates a run at every weight; writes rlg.json, rlg.png and the report into its folder."""
    if not (run / "config.yaml").is_file():
        raise RunFolderError(
            f"{run} is no run folder: config.yaml not found in it; give a folder that `difrl train` made"
        )
    processes = Processes()
    opened = open_run(run, device=processes.device)
    config = opened.config
    prompts = config.data.evaluation
    if prompts is None:
        raise ConfigError(f"{run / 'config.yaml'}: data.evaluation is not set, so there are no prompts to evaluate on")
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"rlg": list(weights), "images": images})})
    known = {r.label for r in [*config.rewards, *config.watch]}
    watched = [*config.watch, *(RewardConfig(name=name) for name in rewards if name not in known)]
    scorer = Scorer.build(config.rewards, watched, processes.device)
    evaluator = Evaluator(opened.policy, scorer, load_prompts(prompts), processes, config.seed)
    result = sweep(evaluator, config, run, processes)
    if processes.is_main:
        write_report([run], run / "report.html")
    return result


def sweep_table(result: Mapping[str, Any], width: int = 80) -> Group:
    """One row a weight, one column a reward, the highest value of each column in bold; as many tables as `width` asks for."""
    names = [n for n in result if n.startswith(("reward/", "watch/", "diversity/")) and not n.endswith("/stderr")]
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
    best = max(v for v in result[name] if v is not None)
    spread = f" ± {number(error[row])}" if error and error[row] is not None else ""
    return f"[bold]{number(value)}[/]{spread}" if value == best else f"{number(value)}{spread}"
