"""Model families: what a diffusers pipeline of one kind calls its parts. A new family is one file and one line here."""

from __future__ import annotations

from difrl.policies.diffusion.families.base import Family
from difrl.policies.diffusion.families.gaussian import Gaussian
from difrl.policies.diffusion.families.sd import StableDiffusion
from difrl.policies.diffusion.families.sd3 import StableDiffusion3

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusion3Pipeline": StableDiffusion3,
    "StableDiffusionPipeline": StableDiffusion,
    "GaussianPipeline": Gaussian,
}
"""Pipeline class, as model_index.json names it -> family."""

__all__ = ["FAMILIES", "Family", "Gaussian", "StableDiffusion", "StableDiffusion3"]
