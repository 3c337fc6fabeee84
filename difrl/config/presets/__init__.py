"""Published methods as points of the grid: a preset is what `algorithm: NAME` puts under a recipe.

A preset holds what defines the method, with the published numbers. What a model, a task or a machine decides
(steps, group size, learning rate, guidance) is the recipe's.
"""

from __future__ import annotations

from collections.abc import Mapping

from difrl.config.presets.distillation import DISTILLATION
from difrl.config.presets.images import IMAGES
from difrl.config.presets.preferences import PREFERENCES
from difrl.config.presets.preset import Preset
from difrl.config.presets.texts import TEXTS

PRESETS: Mapping[str, Preset] = {**IMAGES, **TEXTS, **PREFERENCES, **DISTILLATION}

__all__ = ["PRESETS", "Preset"]
