"""Floating-point formats of recipes."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""`model.dtype` -> torch dtype."""
