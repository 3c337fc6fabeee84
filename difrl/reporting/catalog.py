"""Tables of `difrl recipes`, `difrl rewards` and `difrl models`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from difrl.config.load import read_config, recipe_summary
from difrl.config.presets import PRESETS
from difrl.config.yaml_source import ConfigError, dump
from difrl.runtime.paths import recipes
from difrl.runtime.suggestions import did_you_mean
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


REWARD_HEADINGS: Mapping[str, str] = {
    "images": "rewards of images, and of videos by their frames",
    "videos": "rewards of whole videos",
    "texts": "rewards of texts",
}
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


ANY_MODEL = (
    "Every other pipeline of diffusers that has blocks (a modular pipeline) works too: set model.path to its folder or hub "
    "id, and `difrl check` finds out whether it can be trained. So does every causal language model of transformers."
)


@cache
def published_models() -> Mapping[str, Mapping[str, Any]]:
    """Return the facts about published models by name. benchmarks/models.py writes their file."""
    rows: Mapping[str, Mapping[str, Any]]
    rows = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    return rows


def models_table() -> Group:
    """Return every published model with its pipeline, LoRA targets and the memory of a LoRA run."""
    table = _table("model", "pipeline and LoRA targets", "memory")
    for name, row in published_models().items():
        targets = " ".join(dict.fromkeys(target.removesuffix(".0").rpartition(".")[2] for target in row["targets"]))
        lines = (
            f"{row['title']} · {row['medium']} · {row['process']}",
            f"{row['pipeline']} · verified by {Path(row['verified']).name}",
            f"[dim]LoRA: {escape(targets)}[/]",
        )
        table.add_row(f"[bold]{escape(name)}[/]", "\n".join(lines), row["memory"])
    memory = (
        "memory: `difrl check` of a LoRA of rank 32 at the published size, one sample a pass, in bfloat16 with gradient "
        "checkpointing, at its peak; encoders are on the device only while prompts are encoded"
    )
    return Group(table, f"{memory}\ndetails and a recipe to start from: difrl models NAME\n\n{escape(ANY_MODEL)}")


def model_details(name: str) -> Group:
    """Return the facts about one model and sections of a recipe to start from. Raise ConfigError if none has that name."""
    rows = published_models()
    if name not in rows:
        hint = did_you_mean(name, rows)
        raise ConfigError(f"no model {name!r} is listed; {hint}`difrl models` lists them. {ANY_MODEL}")
    row = rows[name]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts = {
        "pipeline": row["pipeline"],
        "draws": f"{row['medium']}, {row['process']}",
        "weights": f"{row['weights']:.3g} billion in the denoiser, {row['frozen']:.3g} billion in encoders and autoencoder",
        "memory": f"{row['memory']} for a LoRA of rank 32, one sample a pass",
        "LoRA targets": " ".join(row["targets"]),
        "verified by": row["verified"],
        **({"not certain": "; ".join(row["unsure"])} if row["unsure"] else {}),
    }
    for label, fact in facts.items():
        table.add_row(label, escape(fact))
    model = {"path": row["path"], "train": "lora", "dtype": "bfloat16", "gradient_checkpointing": True}
    recipe = dump({"model": model, "rollout": row["rollout"]})
    return Group(f"[bold]{escape(row['title'])}[/]", table, f"\n{escape(recipe)}")
