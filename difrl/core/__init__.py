"""Objectives, advantages, divergences, coefficients: tensors in, tensors out.

No model, no files, no config; nothing here branches on what is being trained. Start at objective.py.
"""

from __future__ import annotations

from difrl.core.advantages import Baseline, Std, advantages, decoupled, informative, reweighted
from difrl.core.coefficients import Coefficient, Constant, Cosine, Linear, RewardAdaptive, Schedule, TargetKL
from difrl.core.collect import Collect, Draw, Informative, Scored, once
from difrl.core.divergences import ESTIMATORS, estimator, gaussian_kl, k1, k2, k3, velocity
from difrl.core.groups import compact, group_mean, group_mean_std, group_spread, group_sum
from difrl.core.likelihoods import Decisions, Likelihoods, collapse
from difrl.core.objective import (
    Aggregation,
    Objective,
    RowObjective,
    Scope,
    aggregation,
    checked,
    penalty,
    reduce,
    resolved,
    statistics_of,
    weighted,
)
from difrl.core.objectives import Clipped
from difrl.core.pacing import InUpdates, Reset, Soup
from difrl.core.weighting import WEIGHTINGS, elbo, forward_logp

__all__ = [
    "ESTIMATORS",
    "WEIGHTINGS",
    "Aggregation",
    "Baseline",
    "Clipped",
    "Coefficient",
    "Collect",
    "Constant",
    "Cosine",
    "Decisions",
    "Draw",
    "InUpdates",
    "Informative",
    "Likelihoods",
    "Linear",
    "Objective",
    "Reset",
    "RewardAdaptive",
    "RowObjective",
    "Schedule",
    "Scope",
    "Scored",
    "Soup",
    "Std",
    "TargetKL",
    "advantages",
    "aggregation",
    "checked",
    "collapse",
    "compact",
    "decoupled",
    "elbo",
    "estimator",
    "forward_logp",
    "gaussian_kl",
    "group_mean",
    "group_mean_std",
    "group_spread",
    "group_sum",
    "informative",
    "k1",
    "k2",
    "k3",
    "once",
    "penalty",
    "reduce",
    "resolved",
    "reweighted",
    "statistics_of",
    "velocity",
    "weighted",
]
