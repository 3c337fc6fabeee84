"""Read a recipe: preset < file < overrides, validated, with the line of every error.

Mappings are merged by key and lists are replaced whole; a section whose `kind` differs from the preset's
replaces it whole too. `key.path=value` overrides take YAML values and may index lists: `rewards.0.weight=2`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from difrl.config import RunConfig
from difrl.config.error_messages import describe_errors
from difrl.config.presets import PRESETS
from difrl.config.schema.base import PathContext
from difrl.config.yaml_source import SIZE, ConfigError, YamlSource, dump, parse, parse_overrides, shorten
from difrl.runtime.errors import MissingFile
from difrl.runtime.files import read_text
from difrl.runtime.paths import find_config
from difrl.runtime.suggestions import did_you_mean

M = TypeVar("M", bound=BaseModel)
RUN_KEYS = RunConfig.model_fields.keys() - {"trackers"}
"""Keys of every run's config.yaml; the first runs have no trackers. Nothing is added to a file with all of them: its preset
may have changed since, and the run goes on as it was started."""


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run of a recipe, with its preset applied. `path` is a file or the name of a recipe."""
    return _validate(RunConfig, _on_preset(_read_file(path, overrides)))


def read_model(model_class: type[M], path: Path | str, overrides: Sequence[str] = ()) -> M:
    """Return another config file, such as one of `difrl pretrain`."""
    return _validate(model_class, _read_file(path, overrides))


def read_argument(model_class: type[M], text: str, place: str) -> M:
    """Return the model of an argument in YAML; errors call it `place`."""
    return _validate(model_class, parse(text, place))


def load_mapping(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return a file with the overrides, neither expanded nor validated."""
    return dict(_read_file(path, overrides).data)


def expand_preset(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe on top of the preset of its `algorithm`."""
    return dict(_on_preset(YamlSource(mapping, {}, "recipe")).data)


def to_yaml(config: BaseModel, paths: PathContext | None = None) -> str:
    """Return every key with its value, in the order of the schema. It reads back to an equal config.

    Paths are written as they were given, or in the form of `paths`.
    """
    return dump(config.model_dump(mode="json", by_alias=True, context=paths))


def recipe_summary(path: Path | str) -> str:
    """Return the first comment line of a recipe, its purpose in a sentence; "" without one."""
    first = Path(path).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _read_file(path: Path | str, overrides: Sequence[str]) -> YamlSource:
    try:
        file = find_config(path)
    except MissingFile as error:
        raise ConfigError(_describe_missing(Path(path), error)) from error
    # A character has up to four bytes. `parse` refuses a longer text at the key where it becomes too long.
    source = parse(read_text(file, file.as_posix(), 4 * SIZE + 4, ConfigError), file.as_posix())
    data = source.data
    if not isinstance(data, dict):
        found = "an empty file" if data is None else "a list" if isinstance(data, list) else shorten(repr(data))
        raise ConfigError(f"{source.find_place(())}: expected keys such as `model:`, found {found}")
    return parse_overrides(overrides).over(source)


def _describe_missing(path: Path, error: MissingFile) -> str:
    if os.path.isdir(path):
        inside = path / "config.yaml"
        hint = f"; did you mean {inside.as_posix()}?" if inside.is_file() else ", expected a YAML file"
        return f"{path.as_posix()} is a folder{hint}"
    files = [file.as_posix() for file in path.parent.glob("*.y*ml")] if os.path.isdir(path.parent) else []
    near = difflib.get_close_matches(path.as_posix(), files)
    return f"{error}" + (f"; nearby: {', '.join(near)}" if near else "")


def _on_preset(source: YamlSource) -> YamlSource:
    algorithm = source.data.get("algorithm")
    if algorithm is None or source.data.keys() >= RUN_KEYS:
        return source
    preset = PRESETS.get(algorithm) if isinstance(algorithm, str) else None
    if preset is None:
        hint = did_you_mean(algorithm, PRESETS)
        problem = f"algorithm: no preset is called {shorten(repr(algorithm))}; {hint}Presets: {', '.join(PRESETS)}"
        raise ConfigError(f"{source.find_place(('algorithm',))}: {problem}")
    return source.over(YamlSource(deepcopy(preset.settings), {}, f"preset {algorithm}"))


def _validate(model_class: type[M], source: YamlSource) -> M:
    try:
        return model_class.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError(*describe_errors(error, model_class, source)) from error
