"""Import of code that a recipe names."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def import_object(path: str) -> Any:
    """Return the object at ``package.module.name`` or ``package.module:name``. Raise ImportError if there is none.

    The message names a file of the working directory that has the name of another module, which Python found before it.
    """
    module, _, attribute = path.replace(":", ".").rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(f"{error}{_describe_clash(module.partition('.')[0])}") from error


def _describe_clash(name: str) -> str:
    found = sys.modules.get(name)
    files = [place for place in (Path.cwd() / f"{name}.py", Path.cwd() / name) if name and os.path.exists(place)]
    if found is None or not files:
        return ""
    place = getattr(found, "__file__", None)
    if place is not None and Path(place).resolve().is_relative_to(files[0].resolve()):
        return ""
    return f"; Python found {place or 'its own module'} under the name {name!r} before {files[0]}: rename your module"
