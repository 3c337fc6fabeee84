"""The error of a recipe that a model cannot serve."""

from __future__ import annotations


class ModelError(ValueError):
    """A model that cannot be loaded or used as asked."""
