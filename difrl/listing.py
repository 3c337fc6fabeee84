"""The tables of `difrl recipes` and `difrl rewards`."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from difrl.config import RunConfig
from difrl.paths import recipes
from difrl.presets import PRESETS
from difrl.reading import load_mapping, read_config, recipe_summary
from rewards import available


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 1, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def recipes_table() -> Table:
    """Every recipe: its point of the grid (likelihood × objective × anchor × advantage), its model and its source."""
    table = _table("recipe", "likelihood × objective × anchor × advantage")
    for name, path in recipes().items():
        if "algorithm" not in load_mapping(path):
            continue  # a file of difrl pretrain
        config = read_config(path)
        source = f"{escape(config.model.path)} · arXiv:{PRESETS[str(config.algorithm)].source}"
        lines = (escape(_coordinates(config)), f"[dim]{source}[/]", escape(recipe_summary(path)))
        table.add_row(f"[bold]{escape(name)}[/]", "\n".join(lines))
    return table


def _coordinates(config: RunConfig) -> str:
    anchors = " + ".join(anchor.label for anchor in config.anchors) or "no anchor"
    std = "no std" if config.advantage.std == "none" else f"{config.advantage.std} std"
    return " × ".join((config.likelihood.kind, config.objective.kind, anchors, std))


def rewards_table() -> Table:
    """Every reward with its options."""
    table = _table("reward", "what it measures", "options")
    for entry in available():
        options = "\n".join(f"{name}: {kind}" for name, kind in entry.options.items())
        table.add_row(f"[bold]{escape(entry.name)}[/]", escape(entry.summary), f"[dim]{escape(options)}[/]")
    return table
