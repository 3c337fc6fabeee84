"""A module of the user that has the name of another one: the error names both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rewards
from difrl.runtime.shadowed_modules import check_own_packages
from rewards import make


@pytest.mark.parametrize("name", ["rewards", "samplers", "difrl", "colorsys"])
@pytest.mark.parametrize("is_package", [False, True])
def test_a_clash_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_package: bool) -> None:
    file = tmp_path / name / "__init__.py" if is_package else tmp_path / f"{name}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text("def mine(samples, prompts, metadata): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "nowhere"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    __import__(name)
    with pytest.raises(ValueError, match=f"under the name '{name}' before .*{name}.*: rename your module"):
        make(f"{name}:mine")


def test_an_ordinary_mistake_names_no_clash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scores_here.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"has no attribute 'y'; start from the folder"):
        make("my_scores_here:y")


def test_own_packages_are_found(tmp_path: Path) -> None:
    check_own_packages("rewards", "samplers")
    (tmp_path / "rewards").mkdir()
    with pytest.raises(ImportError, match="hides the package 'rewards' of difrl: rename your module"):
        check_own_packages("rewards", parent=tmp_path)


def test_a_module_beside_a_script_that_hides_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def mine(samples, prompts, metadata): ...\n")
    root = str(Path(rewards.__file__).parents[1])
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {root!r}]; import difrl"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert f"{tmp_path / 'rewards.py'} hides the package 'rewards' of difrl" in found.stderr
