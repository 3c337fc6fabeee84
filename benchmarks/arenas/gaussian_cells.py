"""The cells of the Gaussian arena: recipes, fixed points, and why each fixed point is what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.arenas.gaussian import GROUP, Cell
from benchmarks.arenas.gaussian_answers import (
    adaptive_clean_slope,
    adaptive_slope,
    constant_slope,
    elbo_weight,
    ghuber_slope,
    group_std_beta,
    guarded_paths,
    matched,
    paths,
    regressed,
    tilt,
)

CLIPPED = {"kind": "clipped"}
MEAN = {"baseline": "mean", "std": "none"}
FROZEN = {"old": {"decay": 1.0}}
"""ℓ_old stays that of the base."""
MEMORYLESS = 2**0.5
"""η of a Flow-SDE that forgets where it started."""
FEW = GROUP / (GROUP - 1)
"""What a baseline that holds the sample itself takes off an advantage."""


def anchor(divergence: str, coefficient: Any = 1.0, place: str = "loss") -> dict[str, Any]:
    """To the base."""
    return {"to": "base", "divergence": divergence, "coefficient": coefficient, "place": place}


def reverse(kernel: str, noise_level: float, *anchors: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Every noisy step a decision, its log-likelihood summed over dimensions."""
    likelihood = {"kind": "reverse", "reduce": "sum", **more.pop("likelihood", {})}
    rollout = {"kernel": kernel, "noise_level": noise_level}
    return {"rollout": rollout, "likelihood": likelihood, "objective": CLIPPED, "anchors": [*anchors], **more}


def forward(weighting: str, *anchors: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Six uniform times a sample; rollouts by a solver of second order, whose own error is small."""
    likelihood = {"kind": "forward", "weighting": weighting, "times": {"kind": "uniform"}, "decisions": 6}
    return {
        "rollout": {"solver": "DPMSolverMultistepScheduler", **more.pop("rollout", {})},
        "likelihood": {**likelihood, **more.pop("likelihood", {})},
        "objective": CLIPPED,
        "anchors": [*anchors],
        **more,
    }


KL = anchor("gaussian")
REVERSE: Sequence[Cell] = (
    Cell(
        "flow_sde",
        "reverse, Flow-SDE η = √2",
        "clipped",
        "Gaussian KL",
        reverse("flow_sde", MEMORYLESS, KL),
        paths(),
        "Memoryless: the start is forgotten, so the optimum over paths is π*.",
    ),
    Cell(
        "ddim",
        "reverse, DDIM η = 1",
        "clipped",
        "Gaussian KL",
        reverse("ddim", 1.0, KL),
        paths(),
        "Memoryless, and exactly the tilt of what the chain samples; 12 steps of it lose variance, which is all of the bias.",
    ),
    Cell(
        "flow_grpo_kl",
        "reverse, Flow-SDE η = 0.7",
        "clipped",
        "Gaussian KL",
        reverse("flow_sde", 0.7, KL),
        paths(),
        "A little of the start is remembered; the mean moves by Cov(x0 | x1) a, not by Σ a.",
    ),
    Cell(
        "dance",
        "reverse, Dance-SDE η = 0.7",
        "clipped",
        "Gaussian KL",
        reverse("dance_sde", 0.7, KL),
        paths(),
        "Two fifths of the variance come from the start, where nothing can be learnt: the mean stops that much short.",
    ),
    Cell(
        "cps",
        "reverse, CPS η = 0.7",
        "clipped",
        "Gaussian KL",
        reverse("cps", 0.7, KL),
        paths(),
        "The sampler itself loses variance by design, towards (1 + cos(ηπ/2))/2 of the data's, and what is lost is not tilted.",
    ),
    Cell(
        "precise",
        "reverse, Precise η = 0.7",
        "clipped",
        "Gaussian KL",
        reverse("precise", 0.7, KL),
        paths(),
        "As DDIM: forgets its start, and its bias is that of 12 steps.",
    ),
    Cell(
        "k3",
        "reverse, Flow-SDE η = √2",
        "clipped",
        "k3",
        reverse("flow_sde", MEMORYLESS, anchor("k3")),
        paths(),
        "k3 follows KL(base ‖ θ), which for two Gaussians of one covariance has the gradient of KL(θ ‖ base).",
    ),
    Cell(
        "k1_reward",
        "reverse, Flow-SDE η = √2",
        "clipped",
        "k1 in the reward",
        reverse("flow_sde", MEMORYLESS, anchor("k1", place="reward")),
        paths(),
        "At the optimum reward and penalty cancel sample by sample, so that the gradient has no noise left.",
    ),
    Cell(
        "flow_grpo",
        "reverse, Flow-SDE η = 0.7",
        "clipped, A / group std",
        "Gaussian KL",
        reverse("flow_sde", 0.7, KL, advantage={"baseline": "mean", "std": "group"}),
        paths(group_std_beta),
        "Dividing by the reward's standard deviation is another β for each prompt.",
    ),
    Cell(
        "grpo_guard",
        "reverse, Flow-SDE η = 0.7",
        "ratio-normalised, / abs(dt)",
        "Gaussian KL",
        reverse(
            "flow_sde",
            0.7,
            anchor("gaussian", 4.0),
            objective={"kind": "ratio_normalised"},
            likelihood={"step_weight": "time_step"},
        ),
        guarded_paths(4.0),
        "std/abs(dt) weighs the reward's pull at every step and not the anchor's: another β at each step.",
    ),
    Cell(
        "flow_dppo",
        "reverse, Flow-SDE η = 0.7",
        "divergence-masked",
        "Gaussian KL",
        reverse("flow_sde", 0.7, KL, objective={"kind": "divergence_masked"}),
        paths(),
        "The mask bounds a step of training and has no part in where training ends.",
    ),
    Cell(
        "crd_paths",
        "reverse, Flow-SDE η = √2",
        "centred, sum, raw; old = base",
        "none",
        reverse(
            "flow_sde",
            MEMORYLESS,
            likelihood={"old": "recompute"},
            snapshots=FROZEN,
            objective={"kind": "centred", "reward": "raw", "decisions": "sum"},
            advantage=MEAN,
        ),
        paths(),
        "β times the path's log-ratio is regressed on the reward: both are linear in the noise, and the fit is exact.",
    ),
    Cell(
        "crd_steps",
        "reverse, Dance-SDE η = 0.7",
        "centred, each, raw; old = base",
        "none",
        reverse(
            "dance_sde",
            0.7,
            likelihood={"old": "recompute"},
            snapshots=FROZEN,
            objective={"kind": "centred", "reward": "raw", "decisions": "each"},
            advantage=MEAN,
        ),
        paths(),
        "The noises of steps are independent, so squaring one by one changes nothing; what the start decides is left over.",
    ),
    Cell(
        "adpo_paths",
        "reverse, Flow-SDE η = √2",
        "anchored preference, sum",
        "implicit",
        reverse(
            "flow_sde",
            MEMORYLESS,
            objective={"kind": "anchored_preference", "decisions": "sum"},
            advantage=MEAN,
        ),
        paths(),
        "Two softmaxes over the group agree where log-ratios are r/β but for a constant.",
    ),
    Cell(
        "reverse_free",
        "reverse, Flow-SDE η = 0.7",
        "clipped",
        "none",
        reverse("flow_sde", 0.7),
        None,
        "Nothing holds the mean: it moves on for as long as training lasts.",
    ),
)
FORWARD: Sequence[Cell] = (
    Cell(
        "awm_elbo",
        "forward, elbo",
        "clipped",
        "weighted",
        forward("elbo", anchor("weighted")),
        matched(constant_slope(elbo_weight), elbo_weight),
        "Likelihood and anchor weigh every time alike: π*.",
    ),
    Cell(
        "awm_uniform",
        "forward, uniform",
        "clipped",
        "velocity",
        forward("uniform", anchor("velocity")),
        matched(constant_slope(np.ones_like), np.ones_like),
        "So do the unweighted loss and the unweighted anchor, though neither is a bound: only their quotient counts here.",
    ),
    Cell(
        "awm_euler",
        "forward, uniform; rollouts by Euler",
        "clipped",
        "velocity",
        forward("uniform", anchor("velocity"), rollout={"solver": None}),
        tilt(1.0),
        "The tilt of what 12 Euler steps sample, whose variance is too small; a finer ODE of the same network is closer.",
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
        "As t, and a sample counts the less the larger its error: β depends on time and on the error.",
    ),
    Cell(
        "awm_adaptive",
        "forward, adaptive",
        "clipped",
        "velocity",
        forward("adaptive", anchor("velocity")),
        matched(adaptive_slope, np.ones_like),
        "Errors in units of their own size: β depends on the error alone, and little.",
    ),
    Cell(
        "guard_forward",
        "forward, uniform",
        "ratio-normalised, batch bias",
        "velocity",
        forward("uniform", anchor("velocity"), objective={"kind": "ratio_normalised", "bias": "batch"}),
        matched(constant_slope(np.ones_like), np.ones_like),
        "The bias is a constant of the batch, and centred advantages do not see it.",
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
        "only an integral over time is fixed, and every network with that integral would do.",
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
        "Squared time by time, a log-ratio pays for its own noise: β at a time is the variance of what the denoiser cannot know.",
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
        "With old at θ the gradient is AWM's, the regression's β has no part in it, and the anchor alone decides.",
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
        "Lagging snapshots arrive where θ is. The adaptive coefficient is its mean, since the distance to the base is the "
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
        "An error on x0 is t times that of the output, and so is its size: β = 1/t, by and large.",
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
        "Best and worst of a group are told apart without error, and a logistic loss on separable pairs has no minimum.",
    ),
    Cell(
        "forward_free",
        "forward, uniform",
        "clipped",
        "none",
        forward("uniform"),
        None,
        "Nothing holds the mean.",
    ),
)
CELLS = (*REVERSE, *FORWARD)
