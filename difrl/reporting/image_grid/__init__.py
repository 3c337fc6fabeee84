"""Sample sheets: images beside their prompts, with scores, as one PIL image."""

from __future__ import annotations

from difrl.reporting.image_grid.grid import compare, grid

__all__ = ["compare", "grid"]
