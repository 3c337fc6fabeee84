"""Sample sheets: images beside the prompts that made them, with their scores, as one PIL picture."""

from __future__ import annotations

from difrl.reporting.image_grid.grid import compare, grid

__all__ = ["compare", "grid"]
