"""Cells with a forward likelihood: recipe, fixed point, and why it is what it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.arenas.gaussian import GROUP, Cell
from benchmarks.arenas.gaussian_answers import (
    adaptive_clean_slope,
    adaptive_slope,
    constant_slope,
    elbo_weight,
    ghuber_slope,
    matched,
    regressed,
    tilt,
)
from benchmarks.arenas.gaussian_recipes import FROZEN, MEAN, anchor, forward

FEW = GROUP / (GROUP - 1)
"""What a baseline that holds the sample itself takes off an advantage."""


FORWARD: Sequence[Cell] = (
    Cell(
        "awm_elbo",
        "forward, elbo",
        "clipped",
        "weighted",
        forward("elbo", anchor("weighted")),
        matched(constant_slope(elbo_weight), elbo_weight),
        "Likelihood and anchor weight all times equally: π*.",
    ),
    Cell(
        "awm_uniform",
        "forward, uniform",
        "clipped",
        "velocity",
        forward("uniform", anchor("velocity")),
        matched(constant_slope(np.ones_like), np.ones_like),
        "The same holds for the unweighted loss and anchor, though neither is a bound: only their quotient matters here.",
    ),
    Cell(
        "awm_euler",
        "forward, uniform; rollouts by Euler",
        "clipped",
        "velocity",
        forward("uniform", anchor("velocity"), rollout={"solver": None}),
        tilt(1.0),
        "The tilt of the distribution of 12 Euler steps, whose variance is too small; a finer ODE of the same network is closer.",
    ),
    Cell(
        "awm_elbo_velocity",
        "forward, elbo",
        "clipped",
        "velocity, c = 8",
        forward("elbo", anchor("velocity", 8.0)),
        matched(constant_slope(elbo_weight), lambda t: 8 * np.ones_like(t)),
        "β = 8t / (3(1 − t)): hardly any tilt near the noise, far too much near the data.",
    ),
    Cell(
        "awm_t",
        "forward, t",
        "clipped",
        "velocity",
        forward("t", anchor("velocity")),
        matched(constant_slope(lambda t: t), np.ones_like),
        "β = 1/t: too little tilt at small t.",
    ),
    Cell(
        "awm",
        "forward, ghuber (AWM)",
        "clipped",
        "velocity",
        forward("ghuber", anchor("velocity")),
        matched(ghuber_slope, np.ones_like),
        "As t, and samples with larger errors count less: β depends on time and on the error.",
    ),
    Cell(
        "awm_adaptive",
        "forward, adaptive",
        "clipped",
        "velocity",
        forward("adaptive", anchor("velocity")),
        matched(adaptive_slope, np.ones_like),
        "Errors in units of their own size: β depends only on the error, and weakly.",
    ),
    Cell(
        "guard_forward",
        "forward, uniform",
        "ratio-normalised, batch bias",
        "velocity",
        forward("uniform", anchor("velocity"), objective={"kind": "ratio_normalised", "bias": "batch"}),
        matched(constant_slope(np.ones_like), np.ones_like),
        "The bias is a constant of the batch, which cancels with centred advantages.",
    ),
    Cell(
        "crd_elbo",
        "forward, elbo, (t, ε) shared",
        "centred, mean, raw; old = base",
        "weighted, c = ½",
        forward(
            "elbo",
            anchor("weighted", 0.5 / FEW),
            likelihood={"old": "recompute", "share": ["t", "noise"]},
            snapshots=FROZEN,
            objective={"kind": "centred", "reward": "raw", "decisions": "mean", "beta": 0.5},
            advantage=MEAN,
        ),
        tilt(1.0),
        "The mean over times is a log-likelihood, so ½ from the regression and ½ from the anchor make β = 1. Without the anchor "
        "only an integral over time is determined, and many networks have that integral.",
    ),
    Cell(
        "crd_each",
        "forward, uniform",
        "centred, each, raw; old = base",
        "none",
        forward(
            "uniform",
            likelihood={"old": "recompute"},
            snapshots=FROZEN,
            objective={"kind": "centred", "reward": "raw", "decisions": "each"},
            advantage=MEAN,
        ),
        regressed(1.0),
        "Squared at each time separately, a log-ratio includes its own noise: β at a time is the variance that the denoiser "
        "cannot predict.",
    ),
    Cell(
        "crd_moving",
        "forward, uniform",
        "centred, each, unit; old = θ",
        "velocity",
        forward(
            "uniform",
            anchor("velocity"),
            likelihood={"old": "recompute"},
            snapshots={"old": {}},
            objective={"kind": "centred"},
        ),
        matched(constant_slope(np.ones_like), np.ones_like),
        "With old = θ the gradient is AWM's. It does not depend on the regression's β, so the anchor alone decides.",
    ),
    Cell(
        "crd",
        "forward, adaptive (CRD)",
        "centred, each, unit; three snapshots",
        "velocity, reward-adaptive",
        forward(
            "adaptive",
            anchor("velocity", {"kind": "reward_adaptive", "value": 2.0, "floor": 1e-4, "limit": 5.0}),
            rollout={"snapshot": "sampler"},
            likelihood={"old": "recompute"},
            snapshots={
                "old": {"decay": {"kind": "linear", "start": 0.25, "end": 0.999, "steps": 149.8}},
                "sampler": {"decay": {"kind": "linear", "start": 0.0, "end": 0.999, "steps": 133.2, "hold": 75}},
            },
            objective={"kind": "centred"},
        ),
        matched(adaptive_slope, np.ones_like),
        "Lagging snapshots reach θ. The adaptive coefficient equals its mean, because the distance to the base is the "
        "same for every sample.",
    ),
    Cell(
        "nft",
        "forward, adaptive on x0 (DiffusionNFT)",
        "negative-aware, b = 1",
        "velocity",
        forward(
            "adaptive",
            anchor("velocity"),
            rollout={"snapshot": "old"},
            likelihood={"old": "recompute", "mix": 1.0, "error": "clean"},
            snapshots={"old": {"decay": {"kind": "linear", "start": 0.0, "end": 0.5, "steps": 500}}},
            objective={"kind": "negative_aware"},
        ),
        matched(adaptive_clean_slope, np.ones_like),
        "An error on x0 is t times that of the output, and so is its size: β = 1/t, approximately.",
    ),
    Cell(
        "dpo",
        "forward, uniform, (t, ε) shared",
        "preference (Diffusion-DPO), β = 1",
        "implicit",
        forward(
            "uniform",
            likelihood={"share": ["t", "noise"]},
            objective={"kind": "preference", "beta": 1.0, "decisions": "mean"},
            advantage=MEAN,
        ),
        None,
        "Best and worst of a group are separable, and a logistic loss on separable pairs has no minimum.",
    ),
    Cell(
        "forward_free",
        "forward, uniform",
        "clipped",
        "none",
        forward("uniform"),
        None,
        "There is no anchor.",
    ),
)
