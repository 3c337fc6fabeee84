"""Cells with a reverse likelihood: recipe, fixed point, and why it is what it is."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.arenas.gaussian import Cell
from benchmarks.arenas.gaussian_answers import group_std_beta, guarded_paths, paths
from benchmarks.arenas.gaussian_recipes import FROZEN, MEAN, anchor, reverse

MEMORYLESS = 2**0.5
"""η of a Flow-SDE that forgets where it started."""
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
        "The noises of the steps are independent, so squaring them one by one changes nothing; the part due "
        "to the initial noise remains.",
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
        "The two softmaxes over the group agree if log-ratios are r/β up to a constant.",
    ),
    Cell(
        "reverse_free",
        "reverse, Flow-SDE η = 0.7",
        "clipped",
        "none",
        reverse("flow_sde", 0.7),
        None,
        "Without an anchor the mean moves as long as training lasts.",
    ),
)
