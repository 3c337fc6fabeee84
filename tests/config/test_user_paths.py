"""Paths of a recipe: `~`, relative paths in the run folder's copy, and a project that was moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from difrl.config import RunConfig
from difrl.config.load import read_config, to_yaml
from difrl.config.schema.base import PathContext
from difrl.training.run_folder import _find_differences
from tests.config.test_load import folder, write

__all__ = ["folder"]

RECIPE = """\
algorithm: flow_grpo
output_dir: runs/one
model: {path: models/sd3, lora: {warm_start: models/lora}}
data: {train: data/p.txt, evaluation: "shapes:eval"}
rewards:
  - {name: clip_score, options: {model: models/clip, processor: owner/name, prompt: "a/b"}}
"""


def make(folder: Path) -> None:
    for name in ("models/sd3", "models/lora", "models/clip", "data", "runs/one"):
        (folder / name).mkdir(parents=True)
    (folder / "data/p.txt").write_text("a red circle\n")


def saved(config: RunConfig, folder: Path) -> RunConfig:
    (folder / "runs/one/config.yaml").write_text(to_yaml(config, PathContext()))
    return read_config(folder / "runs/one/config.yaml")


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "home").mkdir()
    (folder / "home/r.yaml").write_text(RECIPE)
    overrides = ["output_dir=~/run", "model.path=~/sd3", "model.lora.warm_start=~/lora", "data.train=~/p.txt"]
    run = read_config("~/r.yaml", [*overrides, "rewards.0.options.model=~/clip"])
    home = folder / "home"
    assert run.output_dir == home / "run"
    assert [run.model.path, run.model.lora.warm_start] == [str(home / "sd3"), str(home / "lora")]
    assert run.data.train == str(home / "p.txt")
    assert run.rewards[0].options["model"] == str(home / "clip")


def test_the_saved_copy_holds_absolute_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(folder)
    config = read_config(write(folder, RECIPE))
    assert config.data.train == "data/p.txt"
    assert read_config(write(folder, to_yaml(config))) == config  # `--print-config` keeps the paths as given
    copy = saved(config, folder)
    monkeypatch.chdir("/")
    assert copy.output_dir == folder / "runs/one"
    assert [copy.model.path, copy.model.lora.warm_start] == [str(folder / "models/sd3"), str(folder / "models/lora")]
    assert (copy.data.train, copy.data.evaluation) == (str(folder / "data/p.txt"), "shapes:eval")
    assert copy.rewards[0].options == {"model": str(folder / "models/clip"), "processor": "owner/name", "prompt": "a/b"}


def test_a_run_is_the_same_from_every_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(folder)
    config = read_config(write(folder, RECIPE))
    copy = saved(config, folder)
    assert _find_differences(copy, config) == []
    assert _find_differences(config, config) == []  # the copy of an earlier version has the paths as given
    assert _find_differences(copy, read_config("recipe.yaml", ["data.train=data/q.txt"])) == ["data"]
    monkeypatch.chdir("/")
    assert _find_differences(copy, read_config(folder / "runs/one/config.yaml")) == []


def test_a_run_of_a_moved_project_is_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a").mkdir()
    monkeypatch.chdir(folder / "a")
    make(folder / "a")
    copy = saved(read_config(write(folder / "a", RECIPE)), folder / "a")
    (folder / "a").rename(folder / "b")
    monkeypatch.chdir(folder / "b")
    assert _find_differences(copy, read_config("recipe.yaml")) == []
    assert _find_differences(copy, read_config("recipe.yaml", ["model.path=models/clip"])) == ["model"]
