"""The schema of a run: every key of a recipe, with a sentence and a default. Each part of a recipe has a module.

A recipe is one YAML file. `algorithm: awm` fills likelihood, objective, anchors, advantage and related keys from a preset
(difrl/config/presets/); keys of the recipe override it. difrl/config/load.py reads a file, difrl/config/checks/ finds
settings that exclude each other.
"""

from __future__ import annotations

from difrl.config.run import RunConfig
from difrl.config.schema.anchors import (
    AnchorConfig,
    AverageSnapshot,
    DecaySnapshot,
    ResetSnapshot,
    SnapshotConfig,
    SoupSnapshot,
)
from difrl.config.schema.base import Section
from difrl.config.schema.data import AdvantageConfig, CollectConfig, DataConfig, RehearsalConfig
from difrl.config.schema.generation import GenerationConfig, TeacherConfig
from difrl.config.schema.kernels import KernelEntry, register_kernel
from difrl.config.schema.likelihood import (
    ForwardLikelihood,
    FreshNoise,
    GridTimes,
    InversionNoise,
    LikelihoodConfig,
    LogitNormalTimes,
    NoiseConfig,
    ReverseLikelihood,
    Times,
    TokensLikelihood,
    UniformTimes,
)
from difrl.config.schema.model import LoraConfig, ModelConfig
from difrl.config.schema.objective import (
    AnchoredPreferenceObjective,
    CentredObjective,
    ClipCovObjective,
    ClippedObjective,
    DecisionReduction,
    DivergenceMaskedObjective,
    KLCovObjective,
    NegativeAwareObjective,
    ObjectiveConfig,
    ObjectiveSection,
    PreferenceObjective,
    RatioNormalisedObjective,
    register_objective,
)
from difrl.config.schema.rewards import (
    ClipShape,
    LogSigmoidShape,
    MemberConfig,
    MinMaxShape,
    NoiseShape,
    ParShape,
    ReferencesConfig,
    RewardConfig,
    ShapeConfig,
)
from difrl.config.schema.rollout import (
    AllWindow,
    AnyWindow,
    BranchConfig,
    FixedWindow,
    ProgressiveWindow,
    RandomWindow,
    RolloutConfig,
    SlidingWindow,
)
from difrl.config.schema.schedules import (
    AnchorCoefficient,
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    RewardAdaptiveCoefficient,
    RewardWeight,
    ScheduleConfig,
    TargetKLCoefficient,
    ThresholdWeight,
)
from difrl.config.schema.training import CheckpointConfig, EvaluationConfig, GuardConfig, TrainConfig

__all__ = [
    "AdvantageConfig",
    "AllWindow",
    "AnchorCoefficient",
    "AnchorConfig",
    "AnchoredPreferenceObjective",
    "AnyWindow",
    "AverageSnapshot",
    "BranchConfig",
    "CentredObjective",
    "CheckpointConfig",
    "ClipCovObjective",
    "ClipShape",
    "ClippedObjective",
    "CollectConfig",
    "ConstantSchedule",
    "CosineSchedule",
    "DataConfig",
    "DecaySnapshot",
    "DecisionReduction",
    "DivergenceMaskedObjective",
    "EvaluationConfig",
    "FixedWindow",
    "ForwardLikelihood",
    "FreshNoise",
    "GenerationConfig",
    "GridTimes",
    "GuardConfig",
    "InversionNoise",
    "KLCovObjective",
    "KernelEntry",
    "LikelihoodConfig",
    "LinearSchedule",
    "LogSigmoidShape",
    "LogitNormalTimes",
    "LoraConfig",
    "MemberConfig",
    "MinMaxShape",
    "ModelConfig",
    "NegativeAwareObjective",
    "NoiseConfig",
    "NoiseShape",
    "ObjectiveConfig",
    "ObjectiveSection",
    "ParShape",
    "PreferenceObjective",
    "ProgressiveWindow",
    "RandomWindow",
    "RatioNormalisedObjective",
    "ReferencesConfig",
    "RehearsalConfig",
    "ResetSnapshot",
    "ReverseLikelihood",
    "RewardAdaptiveCoefficient",
    "RewardConfig",
    "RewardWeight",
    "RolloutConfig",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "ShapeConfig",
    "SlidingWindow",
    "SnapshotConfig",
    "SoupSnapshot",
    "TargetKLCoefficient",
    "TeacherConfig",
    "ThresholdWeight",
    "Times",
    "TokensLikelihood",
    "TrainConfig",
    "UniformTimes",
    "register_kernel",
    "register_objective",
]
