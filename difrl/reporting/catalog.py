"""The tables of `difrl recipes` and `difrl rewards`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from difrl.config import RunConfig
from difrl.config.load import load_mapping, read_config, recipe_summary
from difrl.config.presets import PRESETS
from difrl.config.yaml_source import ConfigError
from difrl.runtime.paths import recipes
from rewards import Summary, find


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 1, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


MODALITIES: Mapping[str, str] = {
    "reverse": "image models",
    "forward": "image models",
    "tokens": "language models",
}
"""likelihood.kind -> what it is a likelihood of."""


def recipes_table() -> Group:
    """Every recipe: its point of the grid (likelihood × objective × anchor × advantage), its model and its source."""
    named = {
        name: path for name, path in recipes().items() if "algorithm" in load_mapping(path)
    }  # not of difrl pretrain
    read = {name: read_config(path) for name, path in named.items()}
    tables = {
        modality: _table(modality, "likelihood × objective × anchor × advantage") for modality in MODALITIES.values()
    }
    for name, config in read.items():
        source = f"{escape(config.model.path)} · arXiv:{PRESETS[str(config.algorithm)].source}"
        lines = (escape(_coordinates(config)), f"[dim]{source}[/]", escape(recipe_summary(named[name])))
        tables[MODALITIES[config.likelihood.kind]].add_row(f"[bold]{escape(name)}[/]", "\n".join(lines))
    return Group(*tables.values())


def _coordinates(config: RunConfig) -> str:
    anchors = " + ".join(anchor.label for anchor in config.anchors) or "no anchor"
    std = "no std" if config.advantage.std == "none" else f"{config.advantage.std} std"
    return " × ".join((config.likelihood.kind, config.objective.kind, anchors, std))


KINDS: Mapping[str, str] = {"images": "rewards of images", "texts": "rewards of texts"}
"""The first thing a reward needs -> the heading it stands under."""
OTHER = "other rewards"


def rewards_table(entries: Sequence[Summary]) -> Group:
    """Every reward and what it measures, by what it scores."""
    tables: dict[str, Table] = {}
    for entry in sorted(entries, key=lambda entry: [*KINDS, ""].index(_medium(entry))):
        heading = KINDS.get(_medium(entry), OTHER)
        table = tables.setdefault(heading, _table(heading, "what it measures"))
        table.add_row(f"[bold]{escape(entry.name)}[/]", escape(entry.summary))
    return Group(*tables.values(), "options and details: difrl rewards NAME")


def _medium(entry: Summary) -> str:
    return next((need for need in entry.needs if need in KINDS), "")


def reward_details(name: str) -> Group:
    """One reward: what it measures and reads, and its options."""
    try:
        entry = find(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    table = Table("option", "type and default", box=None, padding=(0, 2, 0, 0))
    for name, kind in entry.options.items():
        table.add_row(name, escape(kind))
    needs = f"reads: {', '.join(entry.needs) or 'not said'}"
    head = f"[bold]{escape(entry.name)}[/]" + (f": {escape(entry.summary)}" if entry.summary else "")
    details = [" ".join(paragraph.split()) for paragraph in entry.details.split("\n\n")]
    shown = [f"{text}\n" for text in (head, *map(escape, details), f"[dim]{needs}[/]") if text]
    return Group(*shown, table, "") if entry.options else Group(*shown)
