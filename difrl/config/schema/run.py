"""All sections of a run."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from difrl.config.schema.anchors import AnchorConfig, SnapshotConfig
from difrl.config.schema.base import FolderPath, Section
from difrl.config.schema.data import AdvantageConfig, CollectConfig, DataConfig, RehearsalConfig
from difrl.config.schema.generation import GenerationConfig, TeacherConfig
from difrl.config.schema.likelihood import LikelihoodConfig
from difrl.config.schema.model import ModelConfig
from difrl.config.schema.objective import ObjectiveConfig
from difrl.config.schema.rewards import ReferencesConfig, RewardConfig
from difrl.config.schema.rollout import RolloutConfig
from difrl.config.schema.training import CheckpointConfig, EvaluationConfig, GuardConfig, TrainConfig


class RunSections(Section):
    """The sections of a run, and quantities that follow from them."""

    algorithm: str | None = Field(
        None, description="a preset such as awm: the settings of a method, which the file may override"
    )
    seed: int = 0
    output_dir: FolderPath = Field(Path("runs/default"), strict=False, description="the run folder")
    model: ModelConfig = Field(description="the model that is trained, e.g. model: {path: tiny-sd3}")
    data: DataConfig = Field(description="prompts, e.g. data: {train: prompts.txt}")
    rewards: list[RewardConfig] = Field(min_length=1, description="rewards that are optimised, e.g. [{name: geneval}]")
    watch: list[RewardConfig] = Field([], description="rewards that are scored and never optimised")
    references: ReferencesConfig | None = Field(None, description="samples for shapes of rewards that compare")
    rollout: RolloutConfig = RolloutConfig()
    generation: GenerationConfig = GenerationConfig()
    teachers: dict[str, TeacherConfig] = Field({}, description="name → a language model for anchors")
    likelihood: LikelihoodConfig = Field(
        description="the likelihood of samples; a preset such as algorithm: awm sets it"
    )
    objective: ObjectiveConfig = Field(description="the loss; a preset such as algorithm: awm sets it")
    anchors: list[AnchorConfig] = Field([], description="pulls of θ towards other weights")
    rehearsal: RehearsalConfig | None = Field(None, description="recorded samples on which anchors are measured")
    advantage: AdvantageConfig = AdvantageConfig()
    collect: CollectConfig = CollectConfig()
    snapshots: dict[str, SnapshotConfig] = Field({}, description="name → how it follows θ; old, ema, sampler, …")
    train: TrainConfig = TrainConfig()
    eval: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig | None = Field(
        None, description="ends a run whose watched rewards or diversity fall; {}: the defaults"
    )
    trackers: list[str] = Field([], description="copies of metrics.jsonl in other forms, e.g. [tensorboard]")
    tensorboard: bool = Field(False, description="short for trackers: [tensorboard]")

    @property
    def branches(self) -> int:
        """Number of groups for each prompt: its branches, or one."""
        return 1 if self.rollout.branch is None else self.rollout.branch.count

    @property
    def groups(self) -> int:
        """Number of groups in a step, over all processes. The samples of a group are compared with each other."""
        return self.data.prompts_per_step * self.branches

    @property
    def samples_per_group(self) -> int:
        """Number of samples in a group: all of a prompt, or of one of its branches."""
        return self.data.group_size // self.branches

    @property
    def sampling_snapshots(self) -> tuple[str, ...]:
        """Snapshots whose samples are drawn in training."""
        return (self.rollout.snapshot, *([] if self.references is None else [self.references.snapshot]))
