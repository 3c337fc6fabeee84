"""YAML whose values know where they were written, and how layers of it are put on top of each other.

Scalars are read by the rules of YAML 1.2 rather than PyYAML's 1.1: `1e-4` is a number; `no`, `on` and
`2024-01-01` are text. Nothing else is guessed, and a key that is given twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from difrl.runtime.errors import UserError

KeyPath = tuple[str | int, ...]
Scalar = str | int | float | bool | None


class ConfigError(UserError):
    """What is wrong with a config file or an override: every problem found, a line each."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class SourceValue:
    """A value and its place, such as `recipe.yaml:12`; an empty place is that of what is inside or around."""

    value: Scalar | list[SourceValue] | dict[str, SourceValue]
    place: str

    @classmethod
    def of(cls, data: Any, place: str) -> SourceValue:
        """Plain data, all of it from one place."""
        if isinstance(data, Mapping):
            return cls({str(key): cls.of(item, place) for key, item in data.items()}, place)
        if isinstance(data, list | tuple):
            return cls([cls.of(item, place) for item in data], place)
        return cls(data, place)

    @property
    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: item.plain for key, item in self.value.items()}
        return [item.plain for item in self.value] if isinstance(self.value, list) else self.value

    def place_of(self, path: KeyPath) -> str:
        """Where the value at a path, or else the nearest thing around it, was written."""
        here, place = self, self.place
        for part in path:
            if isinstance(here.value, dict) and part in here.value:
                here = here.value[str(part)]
            elif isinstance(here.value, list) and isinstance(part, int) and part < len(here.value):
                here = here.value[part]
            else:
                break
            place = here.place or _first_place(here) or place
        return place


def overlay(below: SourceValue, above: SourceValue) -> SourceValue:
    """`above` on top of `below`: mappings are merged by key, everything else is replaced whole.

    So is a mapping whose `kind` differs: the options of one kind mean nothing to another.
    """
    if isinstance(below.value, list) and isinstance(above.value, dict):
        return _patch(below, above)
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    kinds = [layer["kind"].value for layer in (below.value, above.value) if "kind" in layer]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        return above
    merged = dict(below.value)
    for key, item in above.value.items():
        merged[key] = overlay(merged[key], item) if key in merged else item
    return SourceValue(merged, above.place or below.place)


def _patch(below: SourceValue, above: SourceValue) -> SourceValue:
    """Entries of a list replaced by number: what `rewards.0.weight=2` means."""
    assert isinstance(below.value, list)
    assert isinstance(above.value, dict)
    items = list(below.value)
    if not above.value or not all(key.isdecimal() for key in above.value):
        # A mapping where a list belongs: the schema will say so, with what it expected.
        return above
    for key, item in above.value.items():
        if int(key) >= len(items):
            entries = f"entries 0 to {len(items) - 1}" if items else "no entries"
            raise ConfigError(f"{_first_place(item)}: there is no entry {key}, the list has {entries}")
        items[int(key)] = overlay(items[int(key)], item)
    return SourceValue(items, above.place or below.place)


def _first_place(item: SourceValue) -> str:
    inner = item.value if isinstance(item.value, dict) else {}
    return item.place or next((place for part in inner.values() if (place := _first_place(part))), "")


def parse(text: str, name: str) -> SourceValue:
    """A YAML document; places are `name:line`."""
    return _Reader(name).read(text)


def parse_overrides(overrides: Iterable[str]) -> SourceValue:
    """`key.path=value` arguments as one layer; of two for the same key the later holds."""
    layer = SourceValue({}, "")
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not all(part.strip() for part in path.split(".")):
            raise ConfigError(f"override '{override}': expected key.path=value, e.g. train.steps=50")
        item = SourceValue.of(parse_value(text, override), f"override '{override}'")
        for part in reversed(path.split(".")):
            item = SourceValue({part.strip(): item}, "")
        layer = overlay(layer, item)
    return layer


def parse_value(text: str, override: str) -> Any:
    """The value of an override: one YAML value."""
    try:
        return _Reader("").read(text).plain if text.strip() else None
    except ConfigError as error:
        reason = error.problems[0].partition(": ")[2]
        raise ConfigError(f"override '{override}': {reason}") from error


_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars by YAML 1.2's core schema."""


_Loader.yaml_implicit_resolvers = {}


_RESOLVERS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$",
        list("-+.0123456789"),
    ),
)


class Dumper(yaml.SafeDumper):
    """Quotes text that either schema, PyYAML's or ours, would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Outside double quotes YAML reads these line breaks of Unicode as spaces, and PyYAML writes them as they are.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


Dumper.add_representer(str, _text)
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_TAG + _tag, re.compile(_pattern), _first)
    Dumper.add_implicit_resolver(_TAG + _tag, re.compile(_pattern), _first)

_SCALARS: dict[str, Callable[[str], Scalar]] = {
    _TAG + "str": str,
    _TAG + "null": lambda text: None,
    _TAG + "bool": lambda text: text.lower() == "true",
    _TAG + "int": lambda text: int(text, 0),
    _TAG + "float": lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
}


class _Reader:
    """Turns YAML's nodes into located values."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.open: set[int] = set()

    def read(self, text: str) -> SourceValue:
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            self._fail(line, f"not valid YAML: {error.problem or error.context}")
        except yaml.YAMLError as error:
            self._fail(1, f"not valid YAML: {' '.join(str(error).split())}")
        return SourceValue(None, f"{self.name}:1") if node is None else self._convert(node, ())

    def _fail(self, line: int, problem: str) -> NoReturn:
        raise ConfigError(f"{self.name}:{line}: {problem}")

    def _convert(self, node: yaml.Node, path: KeyPath) -> SourceValue:
        line = node.start_mark.line + 1
        if id(node) in self.open:
            self._fail(line, f"{dotted(path)}: an alias that contains itself")
        self.open.add(id(node))
        value: Scalar | list[SourceValue] | dict[str, SourceValue]
        if isinstance(node, yaml.MappingNode):
            value = self._mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            value = [self._convert(item, (*path, index)) for index, item in enumerate(node.value)]
        else:
            assert isinstance(node, yaml.ScalarNode)
            value = self._scalar(node, path)
        self.open.remove(id(node))
        return SourceValue(value, f"{self.name}:{line}")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, SourceValue]:
        items: dict[str, SourceValue] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._scalar(key_node, path) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                self._fail(line, f"{dotted(path)}: a key must be text, found {key_node.value}; put it in quotes")
            if key in items:
                self._fail(line, f"{dotted((*path, key))}: given twice, first in line {lines[key]}; remove one")
            lines[key] = line
            # The line of the key: where the value is a block, its own first line is one further down.
            items[key] = SourceValue(self._convert(value_node, (*path, key)).value, f"{self.name}:{line}")
        return items

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Scalar:
        try:
            result: Scalar = _SCALARS[node.tag](node.value)
        except (KeyError, ValueError):
            tag = node.tag.replace(_TAG, "!!")
            self._fail(node.start_mark.line + 1, f"{dotted(path)}: cannot read {node.value!r} as {tag}")
        return result


def dotted(path: KeyPath) -> str:
    """`train.lr`; the whole file where the path is empty."""
    return ".".join(map(str, path)) or "the top level"
