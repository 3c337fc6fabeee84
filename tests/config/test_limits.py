"""Input that is too large, too deep, cyclic, binary or empty is refused at its key, and soon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from difrl.config.load import read_config
from difrl.config.yaml_source import DEPTH, SIZE, VALUES, ConfigError, parse
from difrl.runtime.errors import UserError
from tests.config.test_load import BASE, folder, problems

__all__ = ["folder"]

TOO_LARGE = "too large: expected at most 3,000 values, 50 levels and 64 KiB of text"


def bomb(levels: int) -> str:
    """Return lists of ten aliases of the list above; the last would have 10 ** levels entries."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bomb(9), f"recipe.yaml:7: a3.1.5: {TOO_LARGE}, each alias counted with its values"),
        ("seed: " + "[" * 900 + "]" * 900, "recipe.yaml:7: seed.0.0.0.0.0"),
        ("seed: " + "{a: " * 900 + "1" + "}" * 900, "recipe.yaml:7: seed.a.a.a.a.a"),
        ("watch:\n" + "- {name: geneval}\n" * 100_000, f"recipe.yaml:1002: watch.994: {TOO_LARGE}"),
        ("watch: [" + "{name: geneval}, " * 100_000 + "]", f"recipe.yaml:7: watch.994: {TOO_LARGE}"),
        ("model: {path: " + "x" * 10**6 + "}", f"recipe.yaml:7: model.path: {TOO_LARGE}"),
        ("seed: 0x" + "f" * 5_000, "recipe.yaml:7: seed: cannot read '0xff"),
        ("seed: " + "9" * 5_000, "recipe.yaml:7: seed: cannot read '99"),
        ("train: {steps: 99999999999999999999}", "recipe.yaml:7: train.steps: expected at most 2,147,483,647, found a"),
        ("rollout: {steps: 1000000}", "recipe.yaml:7: rollout.steps: expected at most 10000, found 1000000"),
        ("train: {lr: 1e999}", "recipe.yaml:7: train.lr: expected a finite number, found inf"),
        ("output_dir: ''", "recipe.yaml:7: output_dir: expected a path or a name, found empty text"),
        ('output_dir: "a\\0b"', "recipe.yaml:7: output_dir: expected a path or a name, found the character U+0000"),
        ('output_dir: "a\\eb"', "recipe.yaml:7: output_dir: expected a path or a name, found the character U+001B"),
        (f"output_dir: runs/{'x' * 256}", "recipe.yaml:7: output_dir: expected names of at most 255 bytes in a path"),
        ("output_dir: ~nobody_here/runs", "recipe.yaml:7: output_dir: ~nobody_here/runs: no home folder of that name"),
        ('seed: "\\ud800"', "recipe.yaml:7: seed: cannot read '\\ud800' as !!str"),
        ("seed: \x01", "recipe.yaml:7: not valid YAML: the character U+0001 is not text; remove it"),
        ('seed: "\\Uffffffff"', "recipe.yaml:1: not valid YAML: "),
        ("%YAML 1.99999\n---\nseed: 1", "recipe.yaml:1: not valid YAML: "),
        ("seed: *nothing", "recipe.yaml:7: not valid YAML: found undefined alias 'nothing'"),
        ("seed: !!binary aGk=", "recipe.yaml:7: seed: cannot read 'aGk=' as !!binary"),
        ("? [a]\n: 1", "recipe.yaml:7: the top level: a key must be text, found a list or a mapping"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused_at_the_key(folder: Path, text: str, expected: str) -> None:
    (found, *_) = problems(folder, BASE + text)
    assert found.startswith(expected)
    assert len(found) < 500


def test_limits_are_those_of_the_document() -> None:
    assert len(parse("a: [" + "1, " * (VALUES - 3) + "]", "t").data["a"]) == VALUES - 3
    with pytest.raises(ConfigError, match=rf"t:1: a\.{VALUES - 3}: too large"):
        parse("a: [" + "1, " * (VALUES - 2) + "]", "t")
    parse("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "t")
    with pytest.raises(ConfigError, match="too large"):
        parse("[" * (DEPTH + 2) + "]" * (DEPTH + 2), "t")
    text = f"a: {'x' * (SIZE - 3)}"
    assert parse(text, "t").data == {"a": "x" * (SIZE - 3)}
    with pytest.raises(ConfigError, match="t:1: a: too large"):
        parse(text + "x", "t")
    # Nested aliases are as deep as what they stand for.
    chain = "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 80))])
    with pytest.raises(ConfigError, match="too large"):
        parse(chain, "t")


def test_aliases_repeat_their_values() -> None:
    source = parse("a: &x {b: [1, 2]}\nc: *x\nd: [*x, *x]\n", "t")
    assert source.data == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": [{"b": [1, 2]}] * 2}
    assert source.find_place(("c", "b")) == "t:1"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rewards=[" + "{name: geneval}, " * 5_000 + "]", "rewards.999.name: too large"),
        ("seed=" + "[" * 900, "seed.0.0.0"),
        ("seed=" + "9" * 5_000, "seed: cannot read"),
        (".".join(["a"] * 1_000) + "=1", "expected key.path=value"),
        (f"rewards.{'9' * 5_000}.weight=1", "there is no entry"),
        ("output_dir='\x00'", "not valid YAML: the character U+0000 is not text"),
        ("model.path=\udcff", "not valid YAML: the character U+DCFF is not text"),
        ("model.path=", "expected text, found nothing"),
        (f"algorithm={'awm' * 10_000}", "no preset is called 'awmawm"),
        (f"{'x' * 10_000}=1", ": unknown key"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused_on_the_command_line(folder: Path, override: str, expected: str) -> None:
    (found, *_) = problems(folder, BASE, override)
    assert expected in found
    assert found.startswith("override '")
    assert len(found) < 1_500


def test_many_errors_are_counted(folder: Path) -> None:
    found = problems(folder, BASE + "watch:\n" + "- {nmae: judge}\n" * 500)
    assert found[0].startswith("recipe.yaml:8: watch.0")
    assert len(found) == 21
    assert found[-1] == "and 480 errors more"


def test_only_regular_files_are_read(folder: Path) -> None:
    os.mkfifo("pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml: a device or a pipe, expected a file with text"):
        read_config("pipe.yaml")
    with pytest.raises(ConfigError, match="/dev/zero: a device or a pipe, expected a file with text"):
        read_config("/dev/zero")
    with pytest.raises(UserError, match="names of at most 255 bytes in a path"):
        read_config("x" * 300)
    (folder / "bytes.yaml").write_bytes(bytes(range(256)) * 4096)
    with pytest.raises(ConfigError, match=r"bytes\.yaml:2: not UTF-8 text"):
        read_config("bytes.yaml")


def test_a_folder_does_not_hide_a_recipe(folder: Path) -> None:
    (folder / "quickstart").mkdir()
    assert read_config("quickstart").model.path == "tiny-sd3"
