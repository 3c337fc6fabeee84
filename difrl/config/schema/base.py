"""What every section of a recipe shares."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values are never coerced across types."""

    @classmethod
    def variants(cls) -> list[type[Section]]:
        """Return the classes that a key of this type may hold: itself, or the classes that a `kind` chooses from."""
        return [cls]

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)
