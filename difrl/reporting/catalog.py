"""Tables of `difrl recipes` and `difrl rewards`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from difrl.config.load import read_config, recipe_summary
from difrl.config.presets import PRESETS
from difrl.config.yaml_source import ConfigError
from difrl.runtime.paths import recipes
from rewards import Summary, find


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 1, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


PRESET_HEADINGS: Mapping[str, str] = {
    "reverse": "image models",
    "forward": "image models",
    "tokens": "language models",
}
"""likelihood.kind -> kind of model."""


def recipes_table() -> Group:
    """Return every recipe with its method (likelihood × objective × anchor × advantage), its model and its source."""
    tables = {
        heading: _table(heading, "likelihood × objective × anchor × advantage") for heading in PRESET_HEADINGS.values()
    }
    for name, path in recipes().items():
        if name.startswith("pretrain/"):
            continue
        config = read_config(path)
        anchors = " + ".join(anchor.label for anchor in config.anchors) or "no anchor"
        std = "no std" if config.advantage.std == "none" else f"{config.advantage.std} std"
        method = " × ".join((config.likelihood.kind, config.objective.kind, anchors, std))
        preset = PRESETS[str(config.algorithm)]
        source = f"{config.model.path} · {preset.summary} · arXiv:{preset.source}"
        lines = (escape(method), f"[dim]{escape(source)}[/]", escape(recipe_summary(path)))
        tables[PRESET_HEADINGS[config.likelihood.kind]].add_row(f"[bold]{escape(name)}[/]", "\n".join(lines))
    return Group(*tables.values())


REWARD_HEADINGS: Mapping[str, str] = {"images": "rewards of images", "texts": "rewards of texts"}
"""Modality among the needs of a reward -> heading of its table."""
OTHER = "other rewards"


def rewards_table(entries: Sequence[Summary]) -> Group:
    """Return a table of rewards with their summaries for each modality."""
    groups: dict[str, list[Summary]] = {heading: [] for heading in (*REWARD_HEADINGS.values(), OTHER)}
    for entry in entries:
        groups[next((REWARD_HEADINGS[need] for need in entry.needs if need in REWARD_HEADINGS), OTHER)].append(entry)
    tables = []
    for heading, group in groups.items():
        table = _table(heading, "what it measures")
        for entry in group:
            table.add_row(f"[bold]{escape(entry.name)}[/]", escape(entry.summary))
        tables += [table] if group else []
    return Group(*tables, "options and details: difrl rewards NAME")


def reward_details(name: str) -> Group:
    """Return the details of one reward and its options. Raise ConfigError if no reward has that name."""
    try:
        entry = find(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    table = Table("option", "type and default", box=None, padding=(0, 2, 0, 0))
    for name, kind in entry.options.items():
        table.add_row(name, escape(kind))
    needs = f"reads: {', '.join(entry.needs) or 'unknown'}"
    head = f"[bold]{escape(entry.name)}[/]" + (f": {escape(entry.summary)}" if entry.summary else "")
    details = [" ".join(paragraph.split()) for paragraph in entry.details.split("\n\n")]
    shown = [f"{text}\n" for text in (head, *map(escape, details), f"[dim]{needs}[/]") if text]
    return Group(*shown, table, "") if entry.options else Group(*shown)
