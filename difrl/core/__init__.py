"""Objectives, advantages, divergences and coefficients: functions of tensors alone.

Nothing here uses a model, files or a config, or depends on the kind of model that is trained. Start at objectives/base.py.
"""

from __future__ import annotations

from difrl.core.advantage_estimators import AdvantageEstimator, PerRewardAdvantage, TotalRewardAdvantage
from difrl.core.advantages import Baseline, Std, advantages, gdpo_advantages, informative, scale_by_sign
from difrl.core.aggregation import Aggregation, aggregation_weights, anchor_penalty, weighted_mean
from difrl.core.divergences import LOSS_ESTIMATORS, k1, k2, k3, velocity
from difrl.core.dynamic_sampling import Collect, Draw, DynamicSampling, ScoredSamples, draw_once
from difrl.core.f_divergences import F_DIVERGENCES, FDivergence, alpha_divergence, f_divergence
from difrl.core.forward_weighting import WEIGHTINGS, elbo, forward_logp
from difrl.core.groups import (
    group_first_max,
    group_index,
    group_logsumexp,
    group_mean,
    group_mean_std,
    group_softmax,
    group_spread,
    group_sum,
)
from difrl.core.likelihoods import DecisionReduction, Likelihoods, reduce_over_decisions
from difrl.core.numerics import to_unit_interval
from difrl.core.objectives.anchored_preference import AnchoredPreference
from difrl.core.objectives.base import (
    GroupObjective,
    LossAndMetrics,
    Objective,
    Scope,
    Tensors,
    get_statistics,
)
from difrl.core.objectives.centred import CentredRewardDistillation
from difrl.core.objectives.clipped import Clipped
from difrl.core.objectives.covariance import ClipCov, KLCov
from difrl.core.objectives.divergence_masked import DivergenceMasked
from difrl.core.objectives.negative_aware import NegativeAware
from difrl.core.objectives.preference import Preference
from difrl.core.objectives.ratio_normalised import RatioNormalised
from difrl.core.schedules import (
    Coefficient,
    Constant,
    Cosine,
    LagrangeMultiplier,
    Linear,
    RewardAdaptive,
    Schedule,
    TargetKL,
)
from difrl.core.snapshot_schedules import Average, InUpdates, Reset, Soup

__all__ = [
    "F_DIVERGENCES",
    "LOSS_ESTIMATORS",
    "WEIGHTINGS",
    "AdvantageEstimator",
    "Aggregation",
    "AnchoredPreference",
    "Average",
    "Baseline",
    "CentredRewardDistillation",
    "ClipCov",
    "Clipped",
    "Coefficient",
    "Collect",
    "Constant",
    "Cosine",
    "DecisionReduction",
    "DivergenceMasked",
    "Draw",
    "DynamicSampling",
    "FDivergence",
    "GroupObjective",
    "InUpdates",
    "KLCov",
    "LagrangeMultiplier",
    "Likelihoods",
    "Linear",
    "LossAndMetrics",
    "NegativeAware",
    "Objective",
    "PerRewardAdvantage",
    "Preference",
    "RatioNormalised",
    "Reset",
    "RewardAdaptive",
    "Schedule",
    "Scope",
    "ScoredSamples",
    "Soup",
    "Std",
    "TargetKL",
    "Tensors",
    "TotalRewardAdvantage",
    "advantages",
    "aggregation_weights",
    "alpha_divergence",
    "anchor_penalty",
    "draw_once",
    "elbo",
    "f_divergence",
    "forward_logp",
    "gdpo_advantages",
    "get_statistics",
    "group_first_max",
    "group_index",
    "group_logsumexp",
    "group_mean",
    "group_mean_std",
    "group_softmax",
    "group_spread",
    "group_sum",
    "informative",
    "k1",
    "k2",
    "k3",
    "reduce_over_decisions",
    "scale_by_sign",
    "to_unit_interval",
    "velocity",
    "weighted_mean",
]
