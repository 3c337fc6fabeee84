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
from difrl.config.yaml_source import YamlSource, dotted
from difrl.runtime.suggestions import did_you_mean

PydanticModel = type[BaseModel]

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


def describe_errors(error: ValidationError, model: PydanticModel, source: YamlSource) -> list[str]:
    """Return a line for each error in the values of `source`, in the order of the file."""
    found = [
        (source.find_place(path), f"{dotted(path)}: {sentence}")
        for detail in error.errors(include_url=False)
        for path, sentence in _sentences(detail, model, source.data)
    ]
    return [f"{place}: {problem}" for place, problem in sorted(found, key=lambda item: _line(item[0]))]


def _line(place: str) -> float:
    """Return the line of a place in a file. Overrides and presets come after all lines."""
    number = place.rpartition(":")[2]
    return int(number) if number.isdecimal() else math.inf


def _sentences(detail: Mapping[str, Any], model: PydanticModel, data: Any) -> Iterator[tuple[KeyPath, str]]:
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
    elif kind in _EXPECTED:
        expected, kinds = _EXPECTED[kind].format(**context), _kinds(_sections(model, path, data))
        yield path, _wrong_value(kind, expected, detail["input"], kinds)
    else:
        yield path, f"{detail['msg']}, found {_describe(detail['input'])}"


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


def _wrong_value(error: str, expected: str, value: Any, kinds: list[str]) -> str:
    if kinds and error == "float_type":
        expected += f", or a mapping with kind: {_either(kinds)}"
    sentence = f"expected {expected}, found {_describe(value)}"
    if error == "string_type" and isinstance(value, bool | int | float):
        return f"{sentence}; put it in quotes"
    if error == "literal_error":
        return sentence + did_you_mean(value, re.findall("'([^']*)'", expected), "; did you mean {}?")
    return sentence


def _unknown_key(path: KeyPath, model: PydanticModel, data: Any, loc: KeyPath) -> str:
    parent, key = path[:-1], str(path[-1])
    every = _sections(model, parent, data)
    # Where the section leaves out its kind, pydantic's location has the one it was taken for.
    section = _of_kind(every, {"kind": loc[-2], **_get(data, parent)} if len(loc) > 1 else {})
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


def _missing(path: KeyPath, model: PydanticModel, data: Any) -> str:
    for member in _of_kind(_sections(model, path[:-1], data), _get(data, path[:-1])):
        field = _keys(member).get(str(path[-1]))
        if field is not None and field.description:
            return f"missing ({field.description})"
    return "missing, and it has no default"


def _wrong_kind(path: KeyPath, model: PydanticModel, data: Any) -> str:
    kinds, section = _kinds(_sections(model, path, data)), _get(data, path)
    if "kind" not in section:
        return f"missing; expected {_either(kinds)}"
    found = section["kind"]
    return f"expected {_either(kinds)}, found {_describe(found)}{did_you_mean(found, kinds, '; did you mean {}?')}"


def _describe(value: Any) -> str:
    """Return a value as YAML has it, or its type where that would be long."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _either(words: Iterable[str]) -> str:
    *most, last = dict.fromkeys(words)
    return f"{', '.join(most)} or {last}" if most else last


def _keys(section: PydanticModel) -> dict[str, FieldInfo]:
    """Return the keys of a section under their names in YAML."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _kinds(sections: Iterable[PydanticModel]) -> list[str]:
    fields = [section.model_fields["kind"] for section in sections if "kind" in section.model_fields]
    return [word for field in fields if get_origin(field.annotation) is Literal for word in get_args(field.annotation)]


def _of_kind(sections: list[PydanticModel], data: Any) -> list[PydanticModel]:
    """Return the sections of the kind in the data; all of them if it has none, or an unknown one."""
    kind = data.get("kind") if isinstance(data, dict) else None
    return [section for section in sections if kind in _kinds([section])] or sections


def _choices(annotation: Any) -> list[Any]:
    """Return the types among which an annotation leaves the choice: sections, lists, mappings and scalars."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return list(annotation.variants())
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [choice for part in get_args(annotation) for choice in _choices(part)]
    return [annotation]


def _only_sections(choices: list[Any]) -> list[PydanticModel]:
    return [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]


def _sections(model: PydanticModel, path: KeyPath, data: Any) -> list[PydanticModel]:
    """Return the sections that the schema allows at a path of the data, of every kind."""
    here: list[Any] = [model]
    for part in path:
        inner = [get_args(choice)[-1] for choice in here if get_origin(choice) in (list, dict)]
        fields = [_keys(section).get(str(part)) for section in _of_kind(_only_sections(here), data)]
        inner += [field.annotation for field in fields if field is not None]
        here = [choice for annotation in inner for choice in _choices(annotation)]
        data = _get(data, (part,))
    return _only_sections(here)


def _get(data: Any, path: KeyPath) -> Any:
    """Return the value at a path of the data, {} if there is none."""
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return {}
    return data


def _all_paths(model: PydanticModel, start: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of every key of the schema, with entry 0 for those of lists."""
    for key, field in _keys(model).items():
        path = (*start, key)
        yield path
        for choice in _choices(field.annotation):
            entry = get_origin(choice) in (list, dict)
            for section in _only_sections(_choices(get_args(choice)[-1]) if entry else [choice]):
                yield from _all_paths(section, (*path, 0) if entry else path)
