"""The base class of all sections of a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of a recipe, such as ("rewards", 0, "weight")."""


class Section(BaseModel):
    """A part of a recipe. Unknown keys are errors; values are not coerced across types."""

    @classmethod
    def variants(cls) -> list[type[Section]]:
        """Return the classes that a key of this type may hold: itself, or the classes that a `kind` chooses from."""
        return [cls]

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)
