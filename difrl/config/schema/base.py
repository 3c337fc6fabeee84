"""The base class of all sections of a recipe, and the type of their paths."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    SerializationInfo,
    ValidationInfo,
    field_validator,
)

from difrl.runtime.errors import UserError
from difrl.runtime.paths import expand_user

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of a recipe, such as ("rewards", 0, "weight")."""

_HIGHEST, _HIGHEST_SEED = 2**31 - 1, 2**63 - 1


class Section(BaseModel):
    """A part of a recipe. Unknown keys are errors; values are not coerced across types."""

    @classmethod
    def variants(cls) -> list[type[Section]]:
        """Return the classes that a key of this type may hold: itself, or the classes that a `kind` chooses from."""
        return [cls]

    @field_validator("*")
    @classmethod
    def _check_whole_number(cls, value: Any, info: ValidationInfo) -> Any:
        highest = _HIGHEST_SEED if info.field_name == "seed" else _HIGHEST
        if isinstance(value, int) and abs(value) > highest:
            raise ValueError(f"expected at most {highest:,}, found a whole number of {len(str(abs(value)))} digits")
        return value

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


@dataclass(frozen=True)
class PathContext:
    """The context in which a config is dumped with paths that hold in every working directory.

    Without it, paths are dumped as the recipe gives them.
    """

    base: Path | None = None
    """None: paths are absolute; otherwise relative to this folder."""

    def resolve(self, path: str) -> str:
        """Return a path in this form; a name that is not a path, such as a hub id, as it is."""
        if not (os.path.isabs(path) or os.path.exists(path)):
            return path
        return os.path.abspath(path) if self.base is None else os.path.relpath(path, self.base)


def check_path(path: str) -> str:
    """Return a path, or a name that may stand for one, with `~` as the home folder. Raise ValueError if it cannot be one."""
    if not path.strip():
        raise ValueError("expected a path or a name, found empty text")
    if control := [character for character in path if unicodedata.category(character) == "Cc"]:
        raise ValueError(f"expected a path or a name, found the character U+{ord(control[0]):04X} in it; remove it")
    try:
        expanded = expand_user(path)
    except UserError as error:
        raise ValueError(str(error)) from error
    return str(expanded) if path.startswith("~") else path


def _dump_path(path: str | Path, info: SerializationInfo) -> str:
    return info.context.resolve(str(path)) if info.context else str(path)


PathText = Annotated[str, AfterValidator(check_path), PlainSerializer(_dump_path)]
"""A path, or a name that stands for one: a hub id, a shipped model, a built-in set of prompts."""
FolderPath = Annotated[
    Path,
    BeforeValidator(lambda path: check_path(path) if isinstance(path, str) else path),
    PlainSerializer(_dump_path, when_used="json"),
]
