"""Model families by the class of their diffusers pipeline. Other packages add theirs (docs/extending.md)."""

from __future__ import annotations

from difrl.policies.diffusion.families.base import Family
from difrl.policies.diffusion.families.gaussian import GaussianFamily
from difrl.policies.diffusion.families.sd import StableDiffusion
from difrl.policies.diffusion.families.sd3 import StableDiffusion3
from difrl.runtime.registry import Registry

FAMILIES = Registry[type[Family]]("model family", "difrl.families")
"""Name of a pipeline's class, as in model_index.json -> family."""


def register_family(pipeline_class_name: str, family: type[Family]) -> type[Family]:
    """Use `family` for models whose model_index.json has this `_class_name`. Raise ValueError if the name is taken."""
    return FAMILIES.register(pipeline_class_name, family)


for _family in (StableDiffusion, StableDiffusion3, GaussianFamily):
    register_family(_family.pipeline_class.__name__, _family)

__all__ = ["FAMILIES", "Family", "Gaussian", "StableDiffusion", "StableDiffusion3", "register_family"]
