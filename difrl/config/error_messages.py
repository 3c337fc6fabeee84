"""Readable messages for the errors of pydantic: place, key, what was found, what was expected."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from difrl.config.checks import ConfigConflictError
from difrl.config.schema.base import KeyPath, Section
from difrl.config.yaml_source import YamlSource, dotted, get_value, shorten
from difrl.runtime.suggestions import did_you_mean

PydanticModel = type[BaseModel]

_LISTED = 20
"""Errors of a file that are listed; further ones are counted."""
_LONGEST = 1000
"""Characters of an error that are shown."""
_TYPES = {
    **{"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "path": "text"},
    **{"list": "a list", "tuple": "a list", "dict": "a mapping", "model": "a mapping", "model_attributes": "a mapping"},
}
"""First word of an error about a type -> the type in the words of YAML."""
_BOUNDS = {
    "finite_number": "a finite number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "{min_length} or more entries",
    "too_long": "{max_length} entries at most",
}
"""Type of an error about a bound -> the expectation, from the context of the error."""


def _cut(sentence: str) -> str:
    """Return a sentence that may quote a value of any length."""
    return sentence if len(sentence) <= _LONGEST else f"{sentence[:_LONGEST]}…"


def describe_errors(error: ValidationError, model: PydanticModel, source: YamlSource) -> list[str]:
    """Return a line for each error in the values of `source`, in the order of the file."""
    details = error.errors(include_url=False)
    found = [
        (source.find_place(path), f"{shorten(dotted(path))}: {_cut(sentence)}")
        for detail in details[:_LISTED]
        for path, sentence in _sentences(detail, model, source.data)
    ]
    more = [f"and {len(details) - _LISTED} errors more"] if len(details) > _LISTED else []
    return [*(f"{place}: {problem}" for place, problem in sorted(found, key=lambda item: _line(item[0]))), *more]


def _line(place: str) -> float:
    """Return the line of a place in a file. Overrides and presets come after all lines."""
    number = place.rpartition(":")[2]
    return int(number) if number.isdecimal() else math.inf


def _sentences(detail: Mapping[str, Any], model: PydanticModel, data: Any) -> Iterator[tuple[KeyPath, str]]:
    kind, found, context = detail["type"], detail["input"], detail.get("ctx", {})
    path = _path_in(data, detail["loc"], missing=kind == "missing")
    cause = context.get("error")
    if isinstance(cause, ConfigConflictError):
        yield from cause.conflicts
    elif kind == "value_error":
        yield path, str(cause)
    elif kind == "extra_forbidden":
        yield path, _unknown_key(path, model, data, detail["loc"])
    elif kind == "missing":
        sections = _of_kind(_sections(model, path[:-1], data), get_value(data, (*path[:-1], "kind")))
        fields = [_keys(section).get(str(path[-1])) for section in sections]
        described = next((field.description for field in fields if field and field.description), None)
        yield path, f"missing ({described})" if described else "missing, and it has no default"
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        kinds = _kinds(_sections(model, path, data))
        expected, found = f"expected {_either(kinds)}", get_value(data, (*path, "kind"))
        near = did_you_mean(found, kinds, "; did you mean {}?")
        sentence = f"missing; {expected}" if found is None else f"{expected}, found {_describe(found)}{near}"
        yield (*path, "kind"), sentence
    elif kind == "literal_error":
        expected = context["expected"]
        near = did_you_mean(found, re.findall("'([^']*)'", expected), "; did you mean {}?")
        yield path, f"expected {expected}, found {_describe(found)}{near}"
    elif kind in _BOUNDS:
        yield path, f"expected {_BOUNDS[kind].format(**context)}, found {_describe(found)}"
    elif (words := re.fullmatch("(.+?)_(?:type|from_float|parsing)", kind)) and words[1] in _TYPES:
        expected, kinds = _TYPES[words[1]], _kinds(_sections(model, path, data))
        if kinds and kind == "float_type":
            expected += f", or a mapping with kind: {_either(kinds)}"
        quotes = "; put it in quotes" if kind == "string_type" and isinstance(found, bool | int | float) else ""
        yield path, f"expected {expected}, found {_describe(found)}{quotes}"
    else:
        yield path, f"{detail['msg']}, found {_describe(found)}"


def _path_in(data: Any, loc: KeyPath, missing: bool) -> KeyPath:
    """Return pydantic's location without the names of union members that stand between the keys."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if inside:
            data = data[part]
        if inside or (missing and index == len(loc) - 1):
            path.append(part)
    return tuple(path)


def _unknown_key(path: KeyPath, model: PydanticModel, data: Any, loc: KeyPath) -> str:
    parent, key = path[:-1], str(path[-1])
    every = _sections(model, parent, data)
    # Where the section leaves out its kind, pydantic's location has the one it was taken for.
    section = _of_kind(every, get_value(data, (*parent, "kind"), loc[-2] if len(loc) > 1 else None))
    if others := [member for member in every if key in _keys(member)]:
        found, belongs = _either(_kinds(section)), _either(_kinds(others))
        return f"not a key of kind: {found}; it belongs to kind: {belongs}"
    known = [name for member in section for name in _keys(member)]
    if near := did_you_mean(key, known, "{}"):
        return f"unknown key; did you mean {dotted((*parent, near))}?"
    if elsewhere := [other for other in _all_paths(model) if other[-1] == key]:
        nearest = [dotted(other) for other in elsewhere if len(other) == min(map(len, elsewhere))]
        return f"unknown key here; did you mean {_either(nearest)}?"
    return f"unknown key; expected one of {', '.join(known)}" if known else "unknown key"


def _describe(value: Any) -> str:
    """Return a value as YAML has it, or its type where that would be long."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else shorten(repr(value))


def _either(words: Iterable[str]) -> str:
    *most, last = dict.fromkeys(words)
    return f"{', '.join(most)} or {last}" if most else last


def _keys(section: PydanticModel) -> dict[str, FieldInfo]:
    """Return the keys of a section under their names in YAML."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _kinds(sections: Iterable[PydanticModel]) -> list[str]:
    fields = [section.model_fields["kind"] for section in sections if "kind" in section.model_fields]
    return [word for field in fields if get_origin(field.annotation) is Literal for word in get_args(field.annotation)]


def _of_kind(sections: list[PydanticModel], kind: Any) -> list[PydanticModel]:
    """Return the sections of a kind; all of them if the kind is unknown."""
    return [section for section in sections if kind in _kinds([section])] or sections


def _members(annotation: Any, levels: int = 0) -> Iterator[tuple[PydanticModel, int]]:
    """Yield the sections that a type allows, each with the number of lists and mappings around it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        members = annotation.variants() if issubclass(annotation, Section) else [annotation]
        yield from ((member, levels) for member in members)
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        yield from (found for part in get_args(annotation) for found in _members(part, levels))
    elif get_origin(annotation) in (list, dict):
        yield from _members(get_args(annotation)[-1], levels + 1)


def _sections(model: PydanticModel, path: KeyPath, data: Any) -> list[PydanticModel]:
    """Return the sections that the schema allows at a path of the data, of every kind."""
    here = [(model, 0)]
    for depth, part in enumerate(path):
        sections = [section for section, levels in here if not levels]
        sections = _of_kind(sections, get_value(data, (*path[:depth], "kind")))
        fields = [_keys(section).get(str(part)) for section in sections]
        here = [(section, levels - 1) for section, levels in here if levels]
        here += [found for field in fields if field is not None for found in _members(field.annotation)]
    return [section for section, levels in here if not levels]


def _all_paths(model: PydanticModel, start: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of every key of the schema, with entry 0 for those of lists."""
    for key, field in _keys(model).items():
        path = (*start, key)
        yield path
        for section, levels in _members(field.annotation):
            yield from _all_paths(section, (*path, *[0] * levels))
