"""YAML together with the place where each value was written, layers of it, and its writing.

Scalars follow the core schema of YAML 1.2: `1e-4` is a number; `no`, `on`, `012` and `2024-01-01` are text. A key that is
given twice is an error, and so is a tag of another type. A document that is too large or too deep is refused at the value
where it becomes so, before the rest of it is read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from difrl.config.schema.base import KeyPath
from difrl.runtime.errors import UserError

Scalar = str | int | float | bool | None

SIZE, VALUES, DEPTH = 64 * 1024, 3_000, 50
"""Largest numbers of characters, values and levels of a document, some thirty times those of a long recipe."""
_TOO_LARGE = f"too large: expected at most {VALUES:,} values, {DEPTH} levels and {SIZE // 1024} KiB of text"


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
        while path and get_value(self.data, path, missing := object()) is missing:
            path = path[:-1]
        key = _join(path)
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
            entries = {str(number): entry for number, entry in enumerate(below)}
            if unknown := [key for key in above if key not in entries]:
                found = f"entries 0 to {len(below) - 1}" if below else "no entries"
                place = self.find_place((*path, unknown[0]))
                raise ConfigError(f"{place}: there is no entry {shorten(unknown[0])}, the list has {found}")
            return list(self._merge(entries, above, path).values())
        if not (isinstance(below, dict) and isinstance(above, dict)):
            return above
        if "kind" in below and "kind" in above and below["kind"] != above["kind"]:
            return above
        merged = {key: self._merge(below[key], item, (*path, key)) for key, item in above.items() if key in below}
        return {**below, **above, **merged}


def get_value(data: Any, path: KeyPath, default: Any = None) -> Any:
    """Return the value at a path of plain data, `default` if there is none."""
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return default
    return data


def _join(path: KeyPath) -> str:
    return ".".join(map(str, path))


def dotted(path: KeyPath) -> str:
    """Return a path as text, such as `train.lr`; "the top level" for the empty path."""
    return _join(path) or "the top level"


def shorten(text: str, most: int = 100) -> str:
    """Return text for a message: cut after `most` characters, control characters and the like as escapes."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return "".join(shown) + "…" * (len(text) > most)


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
    place = f"override '{shorten(override)}'"
    if not separator or not all(keys) or len(keys) > DEPTH:
        raise ConfigError(f"{place}: expected key.path=value, e.g. train.steps=50")
    source = _read(text, lambda line: place, tuple(keys))
    data = source.data
    for key in reversed(keys):
        data = {key: data}
    return YamlSource(data, source.places)


def _read(text: str, place: Callable[[int], str], start: KeyPath = ()) -> YamlSource:
    """Return one YAML document, whose root stands at the path `start`; `place` gives the place of a line."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Composer
    yaml.composer.warn_double_anchors = False  # YAML allows them: an alias has the last value
    try:
        root = yaml.compose(text[: SIZE + 1])
        if len(text) > SIZE:
            raise _TooLargeError(None, None, "too large", yaml.reader.get_mark())
    except Exception as error:  # beside its own errors ruamel.yaml has those of numbers in escapes and directives
        line, problem = _syntax_error(error, text)
        if isinstance(error, _TooLargeError) or len(text) > SIZE:
            problem = f"{shorten(dotted((*start, *yaml.composer.path)))}: {_TOO_LARGE}"
        raise ConfigError(f"{place(line)}: {problem}") from error
    converter = _Converter(place, {_join(start): place(1)} if root is None else {})
    return YamlSource(None if root is None else converter.convert(root, start), converter.places)


def _syntax_error(error: Exception, text: str) -> tuple[int, str]:
    """Return the line and the sentence of an error of ruamel.yaml."""
    line, problem = 1, " ".join(str(error).split())
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character U+{error.character:04X} is not text; remove it"
    elif isinstance(error, MarkedYAMLError):
        line = (error.problem_mark or error.context_mark).line + 1
        problem = re.sub(r"\((.*),\)$", r"\1", error.problem or error.context)  # it writes a token as a tuple
    return line, f"not valid YAML: {shorten(problem)}"


class _TooLargeError(ComposerError):
    """The document is too large or too deep at its mark."""


class _Composer(Composer):
    """A composer that stops at the first node which is one too many or too deep."""

    values = 0
    path: tuple[str, ...] = ()
    """Path of the newest node."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if index is not None:
            self.path = (*self.path[: self.depth - 1], str(getattr(index, "value", index)))
        self.values += 1
        if self.values > VALUES or self.depth > DEPTH:
            raise _TooLargeError(None, None, "too large", self.parser.peek_event().start_mark)
        return super().compose_node(parent, index)


@dataclass(frozen=True)
class _Converter:
    """A conversion of the nodes of a document to plain data, which records the places of the values."""

    place: Callable[[int], str]
    places: dict[str, str]

    def convert(self, node: Node, path: KeyPath, parents: tuple[Node, ...] = ()) -> Any:
        self.places.setdefault(_join(path), self.place(_line(node)))
        if any(node is parent for parent in parents):
            self.fail(node, path, "an alias that contains itself")
        if len(self.places) > VALUES or len(parents) > DEPTH:
            self.fail(node, path[:3], f"{_TOO_LARGE}, each alias counted with its values")
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
                found = shorten(key_node.value) if isinstance(key_node, ScalarNode) else "a list or a mapping"
                self.fail(key_node, path, f"a key must be text, found {found}; put it in quotes")
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
            value = _SCALARS[tag][1](node.value)
            str(value).encode()
        except (KeyError, ValueError):  # another tag, too many digits, or half of a surrogate pair
            self.fail(node, path, f"cannot read {shorten(repr(node.value))} as {tag.replace(_TAG, '!!')}")
        return value

    def fail(self, node: Node, path: KeyPath, problem: str) -> NoReturn:
        raise ConfigError(f"{self.place(_line(node))}: {shorten(dotted(path))}: {problem}")


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


_TAG = "tag:yaml.org,2002:"
_NUMBER = r"(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_SCALARS: Mapping[str, tuple[str, Callable[[str], Scalar]]] = {
    _TAG + "null": (r"~|null|Null|NULL|", lambda text: None),
    _TAG + "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    _TAG + "int": (r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+", lambda text: int(text, 0)),
    _TAG + "float": (rf"[-+]?{_NUMBER}|[-+]?\.inf|\.nan", lambda text: float(re.sub(r"\.(?=inf|nan)", "", text))),
    _TAG + "str": (r"(?s:.*)", str),
}
"""Tag -> the plain scalars that have it, and their value: the core schema of YAML 1.2."""


def _resolve(text: str) -> str:
    """Return the tag of a plain scalar."""
    return next(tag for tag, (pattern, _) in _SCALARS.items() if re.fullmatch(pattern, text))


class _Representer(SafeRepresenter):
    def represent_str(self, data: str) -> ScalarNode:
        style = None if _resolve(data) == _TAG + "str" else "'"
        if re.search("[\x85\u2028\u2029]", data):
            style = '"'  # elsewhere YAML reads these line breaks of Unicode as spaces
        return self.represent_scalar(_TAG + "str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def dump(data: Any) -> str:
    """Return plain data as YAML, in the order of its keys. Readers of YAML 1.1 and 1.2 read the same values."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer, yaml.version, yaml.width = _Representer, (1, 1), 100
    yaml.representer.default_flow_style = yaml.representer.sort_base_mapping_type_on_output = False
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue().removeprefix("%YAML 1.1\n---\n")
