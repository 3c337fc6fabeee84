"""The cells of the Gaussian arena."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.arenas.gaussian import Cell
from benchmarks.arenas.gaussian_answers import (
    adaptive_slope,
    constant_slope,
    elbo_weight,
    ghuber_slope,
    group_std_beta,
    matched,
    paths,
    tilt,
)

GAUSSIAN = {"to": "base", "divergence": "gaussian", "coefficient": 1.0}
VELOCITY = {"to": "base", "divergence": "velocity", "coefficient": 1.0}
WEIGHTED = {"to": "base", "divergence": "weighted", "coefficient": 1.0}
CLIPPED = {"kind": "clipped"}
MEMORYLESS = 2**0.5
"""η of a Flow-SDE that forgets where it started."""


def reverse(kernel: str, noise_level: float, anchor: Mapping[str, Any] = GAUSSIAN, **more: Any) -> dict[str, Any]:
    """Every noisy step a decision, its log-likelihood summed over dimensions."""
    return {
        "rollout": {"kernel": kernel, "noise_level": noise_level},
        "likelihood": {"kind": "reverse", "reduce": "sum"},
        "objective": CLIPPED,
        "anchors": [anchor],
        **more,
    }


def forward(weighting: str, anchor: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Six uniform times a sample, rollouts by a solver of second order."""
    return {
        "rollout": {"solver": "DPMSolverMultistepScheduler"},
        "likelihood": {"kind": "forward", "weighting": weighting, "times": {"kind": "uniform"}, "decisions": 6},
        "objective": CLIPPED,
        "anchors": [anchor],
        **more,
    }


REVERSE: Sequence[Cell] = (
    Cell(
        "flow_sde",
        "reverse, Flow-SDE η = √2",
        "clipped",
        "base, Gaussian KL",
        reverse("flow_sde", MEMORYLESS),
        paths(),
        "Memoryless: the optimum over paths is π*.",
    ),
    Cell("ddim", "reverse, DDIM η = 1", "clipped", "base, Gaussian KL", reverse("ddim", 1.0), paths(), ""),
    Cell(
        "flow_grpo_kl",
        "reverse, Flow-SDE η = 0.7",
        "clipped",
        "base, Gaussian KL",
        reverse("flow_sde", 0.7),
        paths(),
        "",
    ),
    Cell("dance", "reverse, Dance-SDE η = 0.7", "clipped", "base, Gaussian KL", reverse("dance_sde", 0.7), paths(), ""),
    Cell("cps", "reverse, CPS η = 0.7", "clipped", "base, Gaussian KL", reverse("cps", 0.7), paths(), ""),
    Cell("precise", "reverse, Precise η = 0.7", "clipped", "base, Gaussian KL", reverse("precise", 0.7), paths(), ""),
    Cell(
        "flow_grpo",
        "reverse, Flow-SDE η = 0.7",
        "clipped, A / group std",
        "base, Gaussian KL",
        reverse("flow_sde", 0.7, advantage={"baseline": "mean", "std": "group"}),
        paths(group_std_beta),
        "",
    ),
    Cell(
        "k1_reward",
        "reverse, Flow-SDE η = √2",
        "clipped",
        "base, k1 in the reward",
        reverse("flow_sde", MEMORYLESS, {"to": "base", "divergence": "k1", "place": "reward", "coefficient": 1.0}),
        paths(),
        "",
    ),
)
FORWARD: Sequence[Cell] = (
    Cell(
        "awm_elbo",
        "forward, elbo",
        "clipped",
        "base, weighted",
        forward("elbo", WEIGHTED),
        matched(constant_slope(elbo_weight), elbo_weight),
        "",
    ),
    Cell(
        "awm_uniform",
        "forward, uniform",
        "clipped",
        "base, velocity",
        forward("uniform", VELOCITY),
        matched(constant_slope(np.ones_like), np.ones_like),
        "",
    ),
    Cell(
        "awm_elbo_velocity",
        "forward, elbo",
        "clipped",
        "base, velocity",
        forward("elbo", {**VELOCITY, "coefficient": 8.0}),
        matched(constant_slope(elbo_weight), lambda t: 8 * np.ones_like(t)),
        "",
    ),
    Cell(
        "awm_t",
        "forward, t",
        "clipped",
        "base, velocity",
        forward("t", VELOCITY),
        matched(constant_slope(lambda t: t), np.ones_like),
        "",
    ),
    Cell(
        "awm",
        "forward, ghuber",
        "clipped",
        "base, velocity",
        forward("ghuber", VELOCITY),
        matched(ghuber_slope, np.ones_like),
        "",
    ),
    Cell(
        "awm_adaptive",
        "forward, adaptive",
        "clipped",
        "base, velocity",
        forward("adaptive", VELOCITY),
        matched(adaptive_slope, np.ones_like),
        "",
    ),
    Cell(
        "awm_euler",
        "forward, uniform, Euler ODE",
        "clipped",
        "base, velocity",
        forward("uniform", VELOCITY, rollout={}),
        tilt(1.0),
        "",
    ),
)
CELLS = (*REVERSE, *FORWARD)
