"""Paths of the files that come with difrl: the recipes (configs/) and the assets (tiny pretrained models).

In a checkout, installed in editable mode or not, recipes are in configs/ at the top. In a wheel they are inside the package, in
difrl/configs. Assets are in difrl/assets in both.
"""

from __future__ import annotations

import os
from pathlib import Path

from difrl.runtime.errors import MissingFile, UserError
from difrl.runtime.suggestions import did_you_mean

PACKAGE = Path(__file__).resolve().parent.parent
_LONGEST_NAME = 255
"""Bytes of a file name that file systems accept."""
_HINT = " (did you mean '{}'?)"


def expand_user(path: str | Path) -> Path:
    """Return a path whose first part `~` or `~NAME` is the home folder.

    Raise UserError if there is no such user, or if a name in it is longer than file systems accept.
    """
    if max(map(len, map(os.fsencode, Path(path).parts)), default=0) > _LONGEST_NAME:
        raise UserError(f"expected names of at most {_LONGEST_NAME} bytes in a path, found a longer one; shorten it")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path}: no home folder of that name; write the whole path, or ./{path} for one in this folder"
        ) from error


def cache_folder() -> Path | None:
    """Return the folder of files that can be computed again: $DIFRL_CACHE, or difrl in $XDG_CACHE_HOME or ~/.cache.

    None if DIFRL_CACHE is empty, or there is no home folder.
    """
    if (chosen := os.environ.get("DIFRL_CACHE")) is not None:
        return expand_user(chosen).absolute() if chosen else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "difrl"
    except RuntimeError:
        return None


def recipes_folder(package: Path = PACKAGE) -> Path:
    """Return the folder with the recipes of the difrl in `package`."""
    checkout = package.parent
    # site-packages may hold somebody else's configs/, but never a pyproject.toml.
    if (checkout / "pyproject.toml").is_file() and (checkout / "configs").is_dir():
        return checkout / "configs"
    if (package / "configs").is_dir():
        return package / "configs"
    raise MissingFile(
        f"difrl's recipes are neither in {checkout / 'configs'} nor in {package / 'configs'}; reinstall difrl"
    )


def recipes(package: Path = PACKAGE) -> dict[str, Path]:
    """Return recipe name -> file, in order. The name of configs/text/grpo.yaml is `text/grpo`."""
    folder = recipes_folder(package)
    files = sorted(folder.rglob("*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def find_config(name: str | Path) -> Path:
    """Return the config file that a user names: an existing path, or the name or path of a recipe."""
    path = expand_user(name)
    if os.path.exists(path) and not os.path.isdir(path):
        return path
    known = recipes()
    recipe = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    if recipe in known:
        return known[recipe]
    raise MissingFile(
        f"no config file '{name}' and no recipe of that name{did_you_mean(recipe, known, _HINT)}; "
        "`difrl recipes` lists the recipes"
    )


def asset(name: str) -> Path:
    """Return the folder or file difrl/assets/`name`, such as the pretrained model `tiny-sd3`."""
    folder = PACKAGE / "assets"
    if name in (known := assets()):
        return folder / name
    raise MissingFile(
        f"difrl has no asset '{name}'{did_you_mean(name, known, _HINT)}; it has {', '.join(known) or 'none'} in {folder}"
    )


def assets() -> list[str]:
    """Return the names of the assets, in order."""
    folder = PACKAGE / "assets"
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(("_", ".")))
