"""Published methods as points of the grid. `algorithm: NAME` puts the settings of a preset under those of a recipe.

A preset holds the settings that define the method, with the published numbers. The recipe holds those that depend on the
model, the task or the machine (steps, group size, learning rate, guidance).
"""

from __future__ import annotations

from collections.abc import Mapping

from difrl.config.presets.distillation import DISTILLATION
from difrl.config.presets.images import IMAGE_PRESETS
from difrl.config.presets.preferences import PREFERENCES
from difrl.config.presets.preset import Preset
from difrl.config.presets.texts import TEXT_PRESETS

PRESETS: Mapping[str, Preset] = {**IMAGE_PRESETS, **TEXT_PRESETS, **PREFERENCES, **DISTILLATION}

__all__ = ["PRESETS", "Preset"]
