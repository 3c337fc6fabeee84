"""YAML together with the place where each value was written, layers of it, and its writing.

Scalars follow the core schema of YAML 1.2: `1e-4` is a number; `no`, `on`, `012` and `2024-01-01` are text. A key that is
given twice is an error. Tags that construct Python objects are refused.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.emitter import Emitter
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from difrl.config.schema.base import KeyPath
from difrl.runtime.errors import UserError

Scalar = str | int | float | bool | None


class ConfigError(UserError):
    """All problems of a config file and its overrides, a line each."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class YamlSource:
    """Plain data, and the places of its values."""

    data: Any
    places: Mapping[str, str]
    """Dotted path -> a place such as `recipe.yaml:12`."""
    elsewhere: str = ""
    """The place of all values that `places` leaves out."""

    def find_place(self, path: KeyPath) -> str:
        """Return the place of the value at a path, or of the nearest value around it if there is none.

        A mapping that only overrides reach into has the place of the first of them.
        """
        here, existing = self.data, list[str]()
        for part in path:
            try:
                here = here[part]
            except (KeyError, IndexError, TypeError):
                break
            existing.append(str(part))
        key = ".".join(existing)
        inside = (place for inner, place in self.places.items() if inner.startswith(f"{key}."))
        return self.places.get(key) or next(inside, self.elsewhere)

    def over(self, below: YamlSource) -> YamlSource:
        """Return this layer on top of another: mappings are merged by key, everything else is replaced whole.

        A mapping whose `kind` differs is replaced whole too, since the kinds have different keys. A mapping with numbers as
        keys, as of the override `rewards.0.weight=2`, replaces these entries of a list.
        """
        merged = self._merge(below.data, self.data, ())
        return YamlSource(merged, {**below.places, **self.places}, below.elsewhere)

    def _merge(self, below: Any, above: Any, path: KeyPath) -> Any:
        if isinstance(below, list) and isinstance(above, dict) and above and all(map(str.isdecimal, above)):
            below = dict(enumerate(below))
            for key in above:
                if int(key) not in below:
                    entries = f"entries 0 to {len(below) - 1}" if below else "no entries"
                    place = self.find_place((*path, key))
                    raise ConfigError(f"{place}: there is no entry {key}, the list has {entries}")
            patched = {int(key): self._merge(below[int(key)], item, (*path, key)) for key, item in above.items()}
            return list({**below, **patched}.values())
        if not (isinstance(below, dict) and isinstance(above, dict)):
            return above
        kinds = [layer["kind"] for layer in (below, above) if "kind" in layer]
        if len(kinds) == 2 and kinds[0] != kinds[1]:
            return above
        merged = {key: self._merge(below[key], item, (*path, key)) for key, item in above.items() if key in below}
        return {**below, **above, **merged}


def _join(path: KeyPath) -> str:
    return ".".join(map(str, path))


def dotted(path: KeyPath) -> str:
    """Return a path as text, such as `train.lr`; "the top level" for the empty path."""
    return _join(path) or "the top level"


def parse(text: str, name: str) -> YamlSource:
    """Return a YAML document whose places are `name:line`. Raise ConfigError with the place if it is not valid."""
    return _read(text, lambda line: f"{name}:{line}")


def parse_overrides(overrides: Iterable[str]) -> YamlSource:
    """Return `key.path=value` arguments as one layer; of two for one key the later holds."""
    layer = YamlSource({}, {})
    for override in overrides:
        layer = _parse_override(override).over(layer)
    return layer


def _parse_override(override: str) -> YamlSource:
    path, separator, text = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not separator or not all(keys):
        raise ConfigError(f"override '{override}': expected key.path=value, e.g. train.steps=50")
    source = _read(text, lambda line: f"override '{override}'", tuple(keys))
    data = source.data
    for key in reversed(keys):
        data = {key: data}
    return YamlSource(data, source.places)


def _read(text: str, place: Callable[[int], str], start: KeyPath = ()) -> YamlSource:
    """Return one YAML document, whose root stands at the path `start`; `place` gives the place of a line."""
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = re.sub(r"\((.*),\)$", r"\1", error.problem or error.context)  # ruamel.yaml writes a token as a tuple
        raise ConfigError(f"{place(line)}: not valid YAML: {problem}") from error
    except YAMLError as error:
        raise ConfigError(f"{place(1)}: not valid YAML: {' '.join(str(error).split())}") from error
    if root is None:
        return YamlSource(None, {_join(start): place(1)})
    converter = _Converter(place, {})
    return YamlSource(converter.convert(root, start), converter.places)


@dataclass(frozen=True)
class _Converter:
    """A conversion of the nodes of a document to plain data, which records the places of the values."""

    place: Callable[[int], str]
    places: dict[str, str]

    def convert(self, node: Node, path: KeyPath, parents: tuple[Node, ...] = ()) -> Any:
        self.places.setdefault(_join(path), self.place(_line(node)))
        if any(node is parent for parent in parents):
            self.fail(node, path, "an alias that contains itself")
        if isinstance(node, MappingNode):
            return self.convert_mapping(node, path, (*parents, node))
        if isinstance(node, SequenceNode):
            return [self.convert(item, (*path, index), (*parents, node)) for index, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self.convert_scalar(node, path)

    def convert_mapping(self, node: MappingNode, path: KeyPath, parents: tuple[Node, ...]) -> dict[str, Any]:
        items: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self.convert_scalar(key_node, path) if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                self.fail(key_node, path, f"a key must be text, found {key_node.value}; put it in quotes")
            if key in items:
                self.fail(key_node, (*path, key), f"given twice, first in line {lines[key]}; remove one")
            # The line of the key: a block begins one line further down.
            lines[key] = _line(key_node)
            self.places[_join((*path, key))] = self.place(lines[key])
            items[key] = self.convert(value_node, (*path, key), parents)
        return items

    def convert_scalar(self, node: ScalarNode, path: KeyPath) -> Scalar:
        explicit = node.ctag.handle is not None
        tag = str(node.tag) if explicit or node.style else _resolve(node.value)
        try:
            return _SCALARS[tag][1](node.value)
        except (KeyError, ValueError):
            self.fail(node, path, f"cannot read {node.value!r} as {tag.replace(_TAG, '!!')}")

    def fail(self, node: Node, path: KeyPath, problem: str) -> NoReturn:
        raise ConfigError(f"{self.place(_line(node))}: {dotted(path)}: {problem}")


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


_TAG = "tag:yaml.org,2002:"
_NUMBER = r"(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_SCALARS: Mapping[str, tuple[str, Callable[[str], Scalar]]] = {
    _TAG + "null": (r"~|null|Null|NULL|", lambda text: None),
    _TAG + "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    _TAG + "int": (r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+", lambda text: int(text, 0)),
    _TAG + "float": (
        rf"[-+]?{_NUMBER}|[-+]?\.inf|\.nan",
        lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
    ),
    _TAG + "str": (r"(?s:.*)", str),
}
"""Tag -> the plain scalars that have it, and their value: the core schema of YAML 1.2."""


def _resolve(text: str) -> str:
    """Return the tag of a plain scalar."""
    return next(tag for tag, (pattern, _) in _SCALARS.items() if re.fullmatch(pattern, text))


class _Representer(SafeRepresenter):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> ScalarNode:
        style = None if _resolve(data) == _TAG + "str" else "'"
        if any(character in data for character in "\x85\u2028\u2029"):
            style = '"'  # elsewhere YAML reads these line breaks of Unicode as spaces
        return self.represent_scalar(_TAG + "str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


class _Emitter(Emitter):
    def choose_scalar_style(self) -> Any:
        """Prefer single quotes, also around apostrophes and line breaks."""
        style = super().choose_scalar_style()
        broken_key = self.simple_key_context and self.analysis.multiline
        single = style == '"' and not self.event.style and self.analysis.allow_single_quoted and not broken_key
        return "'" if single else style


def dump(data: Any) -> str:
    """Return plain data as YAML, in the order of its keys. Readers of YAML 1.1 and 1.2 read the same values."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer, yaml.Emitter, yaml.version = _Representer, _Emitter, (1, 1)
    yaml.width = 100
    yaml.representer.default_flow_style = yaml.representer.sort_base_mapping_type_on_output = False
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue().removeprefix("%YAML 1.1\n---\n")
