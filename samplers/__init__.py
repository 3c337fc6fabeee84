"""Draw samples from a denoiser (processes, kernels, grids, guidance, rollouts, search, solvers), and completions from a
language model (decoding with keyed noise, RLG over its logits).

`t` runs from 1 (noise) to 0 (data); the state at a time s < t is `x_next`. Independent of rewards and of training.
"""

from __future__ import annotations

from samplers.adaptive import Agreement, adaptive_classifier_free, adaptive_reinforcement_learning
from samplers.distance import Distance, Remembering
from samplers.grid import Grid, Scheduler, Window
from samplers.guidance import (
    Blend,
    Condition,
    Counting,
    Denoiser,
    classifier_free,
    extrapolate,
    extrapolate_keeping_norm,
    get_rows,
    reinforcement_learning,
)
from samplers.gumbel import gumbel, sample_keys
from samplers.inversion import invert
from samplers.kernels import (
    KERNELS,
    Gaussian,
    Kernel,
    Reduction,
    cps,
    dance_sde,
    ddim,
    flow_sde,
    make_kernel,
    ode,
    precise,
    transition_std,
)
from samplers.noise import keyed, keyed_uniform, stable_seed
from samplers.process import FlowMatching, Process, VariancePreserving, at_least_float32, corrupt, expand
from samplers.rollout import Trajectory, advance, rollout
from samplers.search import best_of, choose, svdd
from samplers.solvers import draws_noise, solve
from samplers.text import (
    Completions,
    Decoding,
    DecodingError,
    Processing,
    Processor,
    Prompts,
    check_prompts,
    generate,
    get_context_length,
)
from samplers.text_guidance import BaseDivergence, TextGuidance

__all__ = [
    "KERNELS",
    "Agreement",
    "BaseDivergence",
    "Blend",
    "Completions",
    "Condition",
    "Counting",
    "Decoding",
    "DecodingError",
    "Denoiser",
    "Distance",
    "FlowMatching",
    "Gaussian",
    "Grid",
    "Kernel",
    "Process",
    "Processing",
    "Processor",
    "Prompts",
    "Reduction",
    "Remembering",
    "Scheduler",
    "TextGuidance",
    "Trajectory",
    "VariancePreserving",
    "Window",
    "adaptive_classifier_free",
    "adaptive_reinforcement_learning",
    "advance",
    "at_least_float32",
    "best_of",
    "check_prompts",
    "choose",
    "classifier_free",
    "corrupt",
    "cps",
    "dance_sde",
    "ddim",
    "draws_noise",
    "expand",
    "extrapolate",
    "extrapolate_keeping_norm",
    "flow_sde",
    "generate",
    "get_context_length",
    "get_rows",
    "gumbel",
    "invert",
    "keyed",
    "keyed_uniform",
    "make_kernel",
    "ode",
    "precise",
    "reinforcement_learning",
    "rollout",
    "sample_keys",
    "solve",
    "stable_seed",
    "svdd",
    "transition_std",
]
