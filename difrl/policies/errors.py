"""The error of a recipe that a model cannot serve."""

from __future__ import annotations

from difrl.runtime.errors import UserError


class ModelError(UserError):
    """A model that cannot be loaded or used as asked."""
