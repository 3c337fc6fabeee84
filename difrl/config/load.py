"""Reading a recipe: preset < file < overrides, validated, with every error at its line.

Mappings are merged by key and lists are replaced whole; a section whose `kind` differs from the preset's
replaces it whole too. `key.path=value` overrides take YAML values and may index lists: `rewards.0.weight=2`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from difrl.config import RunConfig
from difrl.config.error_messages import explain
from difrl.config.presets import PRESETS
from difrl.config.yaml_source import ConfigError, Dumper, SourceValue, overlay, parse, parse_overrides
from difrl.runtime.paths import find_config

__all__ = [
    "ConfigError",
    "expand",
    "load_mapping",
    "read_config",
    "read_model",
    "read_text",
    "recipe_summary",
    "to_yaml",
]

M = TypeVar("M", bound=BaseModel)


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a recipe describes, its preset applied; a recipe's name stands for its file."""
    return _validated(RunConfig, _on_preset(_load(path, overrides)))


def read_model(model_class: type[M], path: Path | str, overrides: Sequence[str] = ()) -> M:
    """Any other config file, such as one of `difrl pretrain`."""
    return _validated(model_class, _load(path, overrides))


def read_text(model_class: type[M], text: str, place: str) -> M:
    """What an argument says in YAML; `place` is what errors call it."""
    return _validated(model_class, parse(text, place))


def load_mapping(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a file and the overrides say, neither expanded nor validated."""
    return dict(_load(path, overrides).plain)


def expand(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with the preset of its `algorithm` under it."""
    return dict(_on_preset(SourceValue.of(mapping, "recipe")).plain)


def to_yaml(config: BaseModel) -> str:
    """Every key with its value, in the order of the schema; reads back to an equal config."""
    data = config.model_dump(mode="json", by_alias=True)
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def recipe_summary(path: Path | str) -> str:
    """The first comment line of a recipe: what it does, in a sentence."""
    first = Path(path).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _load(path: Path | str, overrides: Sequence[str]) -> SourceValue:
    file = _find(path)
    name = file.as_posix()
    try:
        tree = parse(file.read_text(encoding="utf-8-sig"), name)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text; save the file as UTF-8") from error
    if not isinstance(tree.value, dict):
        raise ConfigError(f"{tree.place}: expected keys such as `model:`, found {_what(tree.value)}")
    return overlay(tree, parse_overrides(overrides))


def _what(value: object) -> str:
    return "an empty file" if value is None else "a list" if isinstance(value, list) else repr(value)


def _find(path: Path | str) -> Path:
    path = Path(path)
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f"; did you mean {inside.as_posix()}?" if inside.is_file() else ", expected a YAML file"
        raise ConfigError(f"{path.as_posix()} is a folder{hint}")
    try:
        return find_config(path)
    except FileNotFoundError as error:
        nearby = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = [(path.parent / name).as_posix() for name in difflib.get_close_matches(path.name, nearby)]
        raise ConfigError(f"{error}" + (f"; nearby: {', '.join(near)}" if near else "")) from error


def _on_preset(tree: SourceValue) -> SourceValue:
    algorithm = tree.value.get("algorithm") if isinstance(tree.value, dict) else None
    if algorithm is None or algorithm.value is None:
        return tree
    preset = PRESETS.get(algorithm.value) if isinstance(algorithm.value, str) else None
    if preset is None:
        near = difflib.get_close_matches(str(algorithm.value), PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        problem = f"algorithm: no preset is called {algorithm.value!r}; {hint}Presets: {', '.join(PRESETS)}"
        raise ConfigError(f"{tree.place_of(('algorithm',))}: {problem}")
    return overlay(SourceValue.of(preset.settings, f"preset {algorithm.value}"), tree)


def _validated(model_class: type[M], tree: SourceValue) -> M:
    try:
        return model_class.model_validate(tree.plain)
    except ValidationError as error:
        raise ConfigError(*explain(error, model_class, tree)) from error
