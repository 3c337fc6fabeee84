"""The precisions that a recipe may name."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""`model.dtype` as torch has it."""
