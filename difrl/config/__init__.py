"""The schema of a run: what a recipe may say, with a sentence and a default for every key; a module a part of it.

A recipe is one YAML file. `algorithm: awm` fills likelihood, objective, anchors, advantage and what belongs
to them from a preset (difrl/presets/); whatever the recipe says itself wins. Reading a file is in
difrl/reading.py, what must hold between parts in difrl/misfits/.
"""

from __future__ import annotations

from difrl.config.data import AdvantageConfig, CollectConfig, DataConfig, RehearsalConfig
from difrl.config.generation import GenerationConfig, TeacherConfig
from difrl.config.likelihood import (
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
from difrl.config.model import LoraConfig, ModelConfig
from difrl.config.objective import (
    AnchoredPreferenceObjective,
    CentredObjective,
    ClipCovObjective,
    ClippedObjective,
    DivergenceMaskedObjective,
    KLCovObjective,
    NegativeAwareObjective,
    ObjectiveConfig,
    OfDecisions,
    PreferenceObjective,
    RatioNormalisedObjective,
)
from difrl.config.regularisation import AnchorConfig, DecaySnapshot, ResetSnapshot, SnapshotConfig, SoupSnapshot
from difrl.config.rewards import (
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
from difrl.config.rollout import (
    AllWindow,
    AnyWindow,
    BranchConfig,
    FixedWindow,
    ProgressiveWindow,
    RandomWindow,
    RolloutConfig,
    SlidingWindow,
)
from difrl.config.run import RunConfig
from difrl.config.schedules import (
    AnchorCoefficient,
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    RewardAdaptiveCoefficient,
    RewardWeight,
    Schedule,
    TargetKLCoefficient,
    ThresholdWeight,
)
from difrl.config.section import Section
from difrl.config.training import CheckpointConfig, EvaluationConfig, GuardConfig, TrainConfig

__all__ = [
    "AdvantageConfig",
    "AllWindow",
    "AnchorCoefficient",
    "AnchorConfig",
    "AnchoredPreferenceObjective",
    "AnyWindow",
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
    "OfDecisions",
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
    "Schedule",
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
]
