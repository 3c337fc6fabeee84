"""A check that the packages of difrl are not hidden by modules of the user."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from difrl.runtime.paths import PACKAGE


def check_own_packages(*names: str, parent: Path = PACKAGE.parent) -> None:
    """Raise ImportError if Python finds a module outside of `parent` under the name of a package in it.

    The folder of a script, and the working directory of `python -m`, come before installed packages.
    """
    for name in names:
        spec = find_spec(name)
        found = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if found is not None and (parent / name).is_dir() and not found.is_relative_to((parent / name).resolve()):
            raise ImportError(f"{found} hides the package {name!r} of difrl: rename your module, or move it elsewhere")
