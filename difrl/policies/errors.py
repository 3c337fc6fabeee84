"""Error of policies that the user can mend."""

from __future__ import annotations

from safetensors import SafetensorError

from difrl.runtime.errors import UserError


class ModelError(UserError):
    """A model cannot be loaded, or cannot be used as the recipe requires."""


LOADING_ERRORS = (
    ImportError,
    OSError,
    RuntimeError,
    ValueError,
    AttributeError,
    LookupError,
    TypeError,
    SafetensorError,
)
"""Errors of the loaders of diffusers and transformers: of the hub, and of a config.json or weights that do not fit."""
