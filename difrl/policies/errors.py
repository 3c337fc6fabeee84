"""Error of policies that the user can mend."""

from __future__ import annotations

from difrl.runtime.errors import UserError


class ModelError(UserError):
    """A model cannot be loaded, or cannot be used as the recipe requires."""
