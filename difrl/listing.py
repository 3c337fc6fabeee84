"""The tables of `difrl recipes` and `difrl rewards`."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

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
    """Every recipe with its point of the grid (likelihood, objective, anchor, advantage) and its source."""
    table = _table("recipe", "grid", "what it does")
    for name, path in recipes().items():
        if "algorithm" not in load_mapping(path):
            continue  # a file of difrl pretrain
        config = read_config(path)
        anchors = " + ".join(anchor.label for anchor in config.anchors) or "no anchor"
        grid = " × ".join((config.likelihood.kind, config.objective.kind, anchors, f"{config.advantage.std} std"))
        table.add_row(
            f"[bold]{escape(name)}[/]",
            f"{escape(grid)}\n[dim]arXiv:{PRESETS[str(config.algorithm)].source}[/]",
            escape(recipe_summary(path)),
        )
    return table


def rewards_table() -> Table:
    """Every reward with its options."""
    table = _table("reward", "what it measures", "options")
    for entry in available():
        options = "\n".join(f"{name}: {kind}" for name, kind in entry.options.items())
        table.add_row(f"[bold]{escape(entry.name)}[/]", escape(entry.summary), f"[dim]{escape(options)}[/]")
    return table
