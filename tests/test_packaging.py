"""A wheel has the recipes, the assets and the three packages, and finds them without a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from difrl.runtime import paths

ROOT = paths.PACKAGE.parent

LOOK = """
import difrl.runtime.paths, rewards, samplers
print(difrl.runtime.paths.PACKAGE)
print(*difrl.runtime.paths.recipes())
print(*difrl.runtime.paths.assets())
"""


def run(*command: str, cwd: Path, **environment: str) -> list[str]:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_an_installed_wheel_finds_its_recipes_and_assets(tmp_path: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), cwd=ROOT)
    site = tmp_path / "site"
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    package, recipes, assets = run(sys.executable, "-c", LOOK, cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(package) == site.resolve() / "difrl"
    assert recipes.split() == list(paths.recipes())
    assert assets.split() == paths.assets()
    installed = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert installed == {"difrl", "rewards", "samplers"}


def test_assets_name_no_path_of_the_machine_that_made_them() -> None:
    """diffusers writes the folder that a part was loaded from into its config.json."""
    configs = [
        file for file in (paths.PACKAGE / "assets").rglob("*.json") if "_name_or_path" in file.read_text("utf-8")
    ]
    assert configs == []
