"""The schema of a run: what a recipe may say, with a sentence and a default for every key; a module a part of it.

A recipe is one YAML file. `algorithm: awm` fills likelihood, objective, anchors, advantage and what belongs
to them from a preset (difrl/config/presets/); whatever the recipe says itself wins. Reading a file is in
difrl/config/load.py, what must hold between parts in difrl/config/checks/.
"""

from __future__ import annotations

from difrl.config.run import RunConfig
from difrl.config.schema.anchors import (
    AnchorConfig,
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
    DivergenceMaskedObjective,
    KLCovObjective,
    NegativeAwareObjective,
    ObjectiveConfig,
    ObjectiveSection,
    OfDecisions,
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
    Schedule,
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
    "register_kernel",
    "register_objective",
]
