"""Model families by the class of their diffusers pipeline. Other packages add theirs (docs/extending.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difrl.policies.diffusion.families.base import Family
from difrl.policies.diffusion.families.gaussian import GaussianFamily
from difrl.policies.diffusion.families.modular import ModularFamily, find_modular_class
from difrl.policies.diffusion.families.sd import StableDiffusion
from difrl.runtime.registry import Registry

FAMILIES = Registry[type[Family]]("model family", "difrl.families")
"""Name of a pipeline's class, as in model_index.json -> family."""


def register_family(pipeline_class_name: str, family: type[Family]) -> type[Family]:
    """Use `family` for models whose model_index.json has this `_class_name`. Raise ValueError if the name is taken."""
    return FAMILIES.register(pipeline_class_name, family)


def find_family(index: Mapping[str, Any]) -> type[Family] | None:
    """Return the family of the pipeline of a model_index.json: one of its own, else the generic one. None if neither fits."""
    if index["_class_name"] in FAMILIES.names():
        return FAMILIES[index["_class_name"]]
    return None if find_modular_class(index) is None else ModularFamily


for _family in (StableDiffusion, GaussianFamily):
    register_family(_family.pipeline_class.__name__, _family)

__all__ = ["FAMILIES", "Family", "GaussianFamily", "ModularFamily", "StableDiffusion", "find_family", "register_family"]
