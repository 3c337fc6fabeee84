"""Shipped recipes with random damage: each loads, or is refused with its place, and soon."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from difrl.config import RunConfig
from difrl.config.load import load_mapping, read_config
from difrl.config.yaml_source import ConfigError, parse
from difrl.runtime.paths import recipes
from tests.reliability.tally import Tally

SECONDS = 1.0
"""Processor time of one recipe."""
SHIPPED = [path for name, path in recipes().items() if not name.startswith("pretrain/")]


def _leaves(data: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the paths of all values below the top."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, value in inner for found in ((*path, key), *_leaves(value, (*path, key)))]


def _value(rng: random.Random) -> Any:
    return rng.choice(
        [
            *(None, True, 0, -1, 1, 3, 2**31, 2**63, 10**60, 0.0, -0.5, 1e-300, 1e308, float("inf"), float("nan")),
            *(
                "",
                " ",
                "a",
                "no",
                "1e-4",
                "~",
                "~nobody_here/x",
                "../x",
                "/",
                "shapes:train",
                "a\nb",
                "\0",
                "\x1b",
                "é" * 300,
            ),
            *("x" * 5_000, [], [1], [[]], [None, "a"], {}, {"kind": "forward"}, {"kind": 3}, {"a": {"b": {}}}),
            *([{"name": "geneval"}] * 3, {"kind": "linear", "start": 1, "end": 0}, list(range(100)), {"0": 1}),
        ]
    )


def _change_value(rng: random.Random, text: str, data: dict[str, Any]) -> str:
    *path, last = rng.choice(_leaves(data))
    inner: Any = data
    for part in path:
        inner = inner[part]
    match rng.randrange(5):
        case 0:
            inner[last] = _value(rng)
        case 1:
            del inner[last]
        case 2 if isinstance(inner, dict):
            inner[rng.choice([f"{last}x", "kind", "steps", "name", "", "a.b", "0"])] = inner.pop(last)
        case 3:
            inner[last] = rng.choice([[inner[last]], {"a": inner[last]}, str(inner[last])])
        case _:
            nested: Any = inner[last]
            for _ in range(rng.choice([2, 60, 300])):
                nested = rng.choice([[nested], {"a": nested}])
            inner[last] = nested
    return json.dumps(data, indent=1)  # JSON is YAML, and written sooner


def _change_text(rng: random.Random, text: str, data: dict[str, Any]) -> str:
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            lines.insert(at, rng.choice(lines))
        case 1:
            del lines[at]
        case 2:
            lines[at] = " " * rng.randrange(6) + lines[at].lstrip()
        case 3:
            place = rng.randrange(len(lines[at]) + 1)
            piece = rng.choice(
                [*"[]{}:,#&*!|>'\"%@`-?\t", "&a ", "*a", "!!int ", "<<: ", "--- ", "\\", "\0", "\u2028", "\ud800"]
            )
            lines[at] = lines[at][:place] + piece + lines[at][place:]
        case _:
            lines[at] = lines[at] * rng.choice([2, 500])
    return "\n".join(lines)


def _repeat(rng: random.Random, text: str, data: dict[str, Any]) -> str:
    opened = rng.choice(["[", "{a: ", "- ", "&a [*a, ", "? ", "'", '"\\u', "| ", "!!a "])
    return f"{text}\n{rng.choice(['watch', 'seed', 'x'])}: {opened * rng.choice([1, 100, 1_000, 20_000])}"


def _change_bytes(rng: random.Random, text: str, data: dict[str, Any]) -> bytes:
    content = bytearray(text.encode())
    for _ in range(rng.choice([1, 3, 30])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content[: rng.randrange(len(content))] if rng.random() < 0.3 else content)


CHANGES: list[Callable[[random.Random, str, dict[str, Any]], str | bytes]] = [
    _change_value,
    _change_value,
    _change_text,
    _change_bytes,
    _repeat,
]


def _check(file: Path, overrides: list[str]) -> None:
    start = time.process_time()
    try:
        assert isinstance(read_config(file, overrides), RunConfig)
    except ConfigError as error:
        for problem in error.problems:
            assert problem.startswith((f"{file}:", "override '", "preset ", "and ")), problem
            assert len(problem) < 3_000, f"{len(problem)} characters"
            problem.encode()
    assert time.process_time() - start < SECONDS, "too slow"


def test_recipes_with_damage(tally: Tally, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    for index in tally.trials(short=60, long=9_000):
        rng = random.Random(index)
        recipe = rng.choice(SHIPPED)
        text: str | bytes = recipe.read_text(encoding="utf-8")
        for _ in range(rng.choice([1, 1, 2])):
            if isinstance(text, str):
                try:
                    data = parse(text, "recipe").data
                except ConfigError:
                    break
                text = rng.choice(CHANGES)(rng, text, data) if isinstance(data, dict) and data else "- a"
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        with tally.trial(f"{index} ({recipe.stem})"):
            _check(file, [])


def test_overrides_with_damage(tally: Tally, tmp_path: Path) -> None:
    """Values of every form, and pieces of YAML, for keys that exist and that do not."""
    pieces = [
        *"[]{}:,#&*!|>'\"%@`-?~=.\0\t\n\x1b",
        "a",
        "0",
        "1e9",
        "null",
        "kind",
        "\udcff",
        "é",
        "&a [*a]",
        "[" * 900,
        "9" * 5_000,
    ]
    for index in tally.trials(short=40, long=1_000):
        rng = random.Random(index)
        recipe = rng.choice(SHIPPED)
        key = ".".join(map(str, rng.choice(_leaves(load_mapping(recipe)))))
        if rng.random() < 0.3:
            key += rng.choice([".a", ".0", ".", "..x", "x" * 2_000, ".a" * 500, "\udcff"])
        value = "".join(rng.choices(pieces, k=rng.choice([0, 1, 2, 4])))
        with tally.trial(f"{index} ({recipe.stem}, {key[:40]!r}={value[:40]!r})"):
            _check(recipe, [f"{key}={value}"])
