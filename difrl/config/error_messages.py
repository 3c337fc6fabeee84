"""What pydantic found wrong, as a person would say it: place, key, what was found, what was expected."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from difrl.config.checks import ConfigConflictError
from difrl.config.schema.base import Section
from difrl.config.yaml_source import KeyPath, SourceValue, dotted

Model = type[BaseModel]

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "path_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "{min_length} or more entries",
    "too_long": "{max_length} entries at most",
    "literal_error": "{expected}",
}


def explain(error: ValidationError, model: Model, tree: SourceValue) -> list[str]:
    """A line for each thing wrong with the values in `tree`, in the order of the file."""
    data, found = tree.plain, []
    for detail in error.errors(include_url=False):
        for path, sentence in _sentences(detail, model, data):
            found.append((tree.place_of(path), f"{dotted(path)}: {sentence}"))
    return [f"{place}: {problem}" for place, problem in sorted(found, key=lambda item: _line(item[0]))]


def _line(place: str) -> float:
    """The line of a place in a file; overrides and presets come after all of them."""
    number = place.rpartition(":")[2]
    return int(number) if number.isdecimal() else math.inf


def _sentences(detail: Mapping[str, Any], model: Model, data: Any) -> Iterator[tuple[KeyPath, str]]:
    kind, context = detail["type"], detail.get("ctx", {})
    path = _path_in(data, detail["loc"], missing=kind == "missing")
    cause = context.get("error")
    if isinstance(cause, ConfigConflictError):
        yield from cause.conflicts
    elif kind == "value_error":
        yield path, str(cause)
    elif kind == "extra_forbidden":
        yield path, _unknown_key(path, model, data, detail["loc"])
    elif kind == "missing":
        yield path, _missing(path, model, data)
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        yield (*path, "kind"), _wrong_kind(path, model, data)
    else:
        yield path, _wrong_value(kind, context, path, model, data, detail)


def _path_in(data: Any, loc: KeyPath, missing: bool) -> KeyPath:
    """pydantic's location without the names of union members that it puts between the keys."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        inside = part in data if isinstance(data, dict) else False
        if isinstance(data, list) and isinstance(part, int):
            inside = part < len(data)
        if inside:
            data = data[part]
        if inside or (missing and index == len(loc) - 1):
            path.append(part)
    return tuple(path)


def _wrong_value(
    kind: str, context: Mapping[str, Any], path: KeyPath, model: Model, data: Any, detail: Mapping[str, Any]
) -> str:
    value = detail["input"]
    if kind not in _EXPECTED:
        return f"{detail['msg']}, found {described(value)}"
    expected = _EXPECTED[kind].format(**context)
    kinds = _kinds(_sections(model, path, data))
    if kinds and kind == "float_type":
        expected += f", or a mapping with kind: {_either(kinds)}"
    sentence = f"expected {expected}, found {described(value)}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f"{sentence}; put it in quotes"
    if kind == "literal_error" and isinstance(value, str):
        return sentence + _did_you_mean(value, re.findall("'([^']*)'", expected))
    return sentence


def _unknown_key(path: KeyPath, model: Model, data: Any, loc: KeyPath) -> str:
    parent, key = path[:-1], str(path[-1])
    every = _sections(model, parent, data)
    # Where the section leaves out its kind, pydantic's location has the one it was taken for.
    section = _of_kind(every, {"kind": loc[-2], **_at(data, parent)} if len(loc) > 1 else {})
    known = [name for member in section for name in _keys(member)]
    if others := [member for member in every if key in _keys(member)]:
        found, belongs = _either(_kinds(section)), _either(_kinds(others))
        return f"not a key of kind: {found}; it belongs to kind: {belongs}"
    if near := difflib.get_close_matches(key, known, n=1):
        return f"unknown key; did you mean {dotted((*parent, near[0]))}?"
    if elsewhere := [other for other in _all_paths(model, ()) if other[-1] == key]:
        nearest = [dotted(other) for other in elsewhere if len(other) == min(map(len, elsewhere))]
        return f"unknown key here; did you mean {_either(nearest)}?"
    return f"unknown key; expected one of {', '.join(known)}" if known else "unknown key"


def _missing(path: KeyPath, model: Model, data: Any) -> str:
    for member in _of_kind(_sections(model, path[:-1], data), _at(data, path[:-1])):
        field = _keys(member).get(str(path[-1]))
        if field is not None and field.description:
            return f"missing ({field.description})"
    return "missing, and it has no default"


def _wrong_kind(path: KeyPath, model: Model, data: Any) -> str:
    kinds = _kinds(_sections(model, path, data))
    section = _at(data, path)
    if "kind" not in section:
        return f"missing; expected {_either(kinds)}"
    found = section["kind"]
    hint = _did_you_mean(found, kinds) if isinstance(found, str) else ""
    return f"expected {_either(kinds)}, found {described(found)}{hint}"


def described(value: Any) -> str:
    """A value as it would be written in YAML, or what it is where that would be long."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _either(words: Iterable[str]) -> str:
    *most, last = dict.fromkeys(words)
    return f"{', '.join(most)} or {last}" if most else last


def _keys(model: Model) -> dict[str, FieldInfo]:
    """A section's keys as they are written in YAML."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _kinds(models: Iterable[Model]) -> list[str]:
    fields = [model.model_fields["kind"] for model in models if "kind" in model.model_fields]
    return [word for field in fields if get_origin(field.annotation) is Literal for word in get_args(field.annotation)]


def _models(annotation: Any) -> list[Model]:
    """Every section an annotation allows, inside unions, lists and mappings too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return list(annotation.variants()) if issubclass(annotation, Section) else [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _is_container(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return any(map(_is_container, get_args(annotation)))
    return origin in (list, dict, tuple)


def _sections(model: Model, path: KeyPath, data: Any) -> list[Model]:
    """The sections the schema allows at a path of the data, of every kind."""
    here, inside_container = [model], False
    for part in path:
        if inside_container:
            inside_container = False
        else:
            fields = [keys[part] for keys in map(_keys, _of_kind(here, data)) if isinstance(part, str) and part in keys]
            here = [found for field in fields for found in _models(field.annotation)]
            inside_container = any(_is_container(field.annotation) for field in fields)
        data = _at(data, (part,))
    return [] if inside_container else here


def _of_kind(models: list[Model], section: Any) -> list[Model]:
    """Those of the kind that the section names; all where it names none."""
    kind = section.get("kind") if isinstance(section, dict) else None
    return [model for model in models if kind in _kinds([model])] or models


def _at(data: Any, path: KeyPath) -> Any:
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return {}
    return data


def _all_paths(model: Model, start: KeyPath) -> Iterator[KeyPath]:
    for key, field in _keys(model).items():
        path = (*start, key)
        yield path
        inner = (*path, 0) if _is_container(field.annotation) else path
        for member in _models(field.annotation):
            yield from _all_paths(member, inner)
