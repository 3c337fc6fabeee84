"""Recipes and assets are found from a checkout and from an installed package."""

from __future__ import annotations

from pathlib import Path

import pytest

from difrl.runtime import paths


def make(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_checkout_has_its_recipes_at_the_top(tmp_path: Path) -> None:
    root = make(tmp_path, "pyproject.toml", "configs/quickstart.yaml", "configs/text/grpo.yaml")
    found = paths.recipes(root / "difrl")
    assert list(found) == ["quickstart", "text/grpo"]
    assert found["text/grpo"] == root / "configs/text/grpo.yaml"


def test_installed_package_has_its_recipes_inside(tmp_path: Path) -> None:
    site = make(tmp_path, "difrl/configs/quickstart.yaml", "configs/of_somebody_else.yaml")
    assert list(paths.recipes(site / "difrl")) == ["quickstart"]


def test_missing_recipes_say_where_they_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="reinstall difrl"):
        paths.recipes(tmp_path / "difrl")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = make(tmp_path / "site" / "difrl", "configs/quickstart.yaml", "configs/text/grpo.yaml")
    make(package, "assets/tiny-sd3/model_index.json", "assets/__init__.py")
    monkeypatch.setattr(paths, "PACKAGE", package)
    monkeypatch.setattr(paths, "recipes", lambda: {"quickstart": package / "configs/quickstart.yaml"})
    monkeypatch.chdir(tmp_path)
    return package


@pytest.mark.parametrize("typed", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_recipe_is_found_by_name_from_any_folder(shipped: Path, typed: str) -> None:
    assert paths.find_config(typed) == shipped / "configs/quickstart.yaml"


def test_a_file_of_the_user_comes_before_a_recipe(shipped: Path, tmp_path: Path) -> None:
    make(tmp_path, "configs/quickstart.yaml")
    assert paths.find_config("configs/quickstart.yaml") == Path("configs/quickstart.yaml")


def test_unknown_config_names_the_nearest_recipe(shipped: Path) -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'quickstart'"):
        paths.find_config("quikstart")


def test_assets(shipped: Path) -> None:
    assert paths.assets() == ["tiny-sd3"]
    assert paths.asset("tiny-sd3") == shipped / "assets/tiny-sd3"
    with pytest.raises(FileNotFoundError, match=r"did you mean 'tiny-sd3'.*it has tiny-sd3 in"):
        paths.asset("tiny-sd4")


def test_no_assets_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paths, "PACKAGE", tmp_path)
    assert paths.assets() == []
    with pytest.raises(FileNotFoundError, match="it has none"):
        paths.asset("tiny-sd3")
