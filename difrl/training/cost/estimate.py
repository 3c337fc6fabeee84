"""`difrl check`: find out whether a recipe can run and roughly what it costs, without loading weights.

The policy and the trainer are those of the run, on the meta device: they refuse what a run refuses. memory.py counts what their
tensors take, FLOPs are those of a pass there (images.py, texts.py), the number of evaluations is that of a dry run
(dry_run.py), and time a rough range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from difrl.config import RunConfig
from difrl.config.run import samples_base_at_end
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.language.policy import LanguagePolicy
from difrl.policies.load import load_policy
from difrl.runtime.dtypes import DTYPES
from difrl.training.cost.dry_run import AlikeProcesses, Evaluations, count_evaluations
from difrl.training.cost.flops import measure_matmul_speed
from difrl.training.cost.images import count_image_cost
from difrl.training.cost.memory import Memory, MemoryCounts
from difrl.training.cost.model_cost import ModelCost
from difrl.training.cost.texts import count_text_cost
from difrl.training.inputs import load_inputs
from difrl.training.trainer import Trainer


@dataclass(frozen=True)
class Estimate:
    """Cost of a run."""

    model: ModelCost
    counts: MemoryCounts
    """The counts that its memory comes from, for other settings."""
    config: RunConfig
    evaluations: Evaluations
    processes: int
    device: str
    capacity: int | None
    """Bytes of the device, where known."""
    speed: float
    """FLOP/s of a large matrix product on the device, measured."""

    @cached_property
    def process_memory(self) -> Memory:
        """Memory of a process."""
        return self.counts.count(self.config, self.processes)

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of a process by name, in all phases. `process_memory.peak` has the sum of those that are held at once."""
        return self.process_memory.by_name

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Rough bounds of the model's time in a step; the upper one has every draw that collect allows."""
        counts, forward = self.evaluations, self.model.forward
        rest = (counts.without_gradient + counts.check) * forward + counts.gradient * self.model.training
        return self._seconds(counts.rollout * forward + rest, counts.draws * counts.rollout * forward + rest)

    @property
    def run_seconds(self) -> tuple[float, float]:
        """The same of the whole run, evaluations and reference samples included."""
        counts, forward = self.evaluations, self.model.forward
        once = self._seconds(counts.evaluation * forward, (counts.evaluation + counts.reference_samples) * forward)
        low, high = self.step_seconds
        return counts.steps * low + once[0], counts.steps * high + once[1]

    def _seconds(self, least: float, most: float) -> tuple[float, float]:
        low, high = self.model.efficiency
        return least / (self.processes * self.speed * high), most / (self.processes * self.speed * low)


def estimate(config: RunConfig, processes: int = 1) -> Estimate:
    """Check a recipe as far as that takes no weights, and estimate its cost. Raise ConfigError or ModelError."""
    inputs = load_inputs(config, processes)
    policy = load_policy(config, "meta", keep_base=samples_base_at_end(config))
    policy.validate_prompts([*inputs.train, *inputs.evaluation])
    trainer = Trainer(config, policy, inputs.scorer, inputs.train, AlikeProcesses(processes))
    if isinstance(policy, DiffusionPolicy):
        model = count_image_cost(config, policy, inputs)
    else:
        assert isinstance(policy, LanguagePolicy)
        model = count_text_cost(config, policy, inputs)
    evaluations = count_evaluations(config, model.dry, inputs, processes)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    cuda = device.type == "cuda"
    return Estimate(
        model=model,
        counts=MemoryCounts(config, policy, model, _count_least(config, policy, trainer, evaluations)),
        config=config,
        evaluations=evaluations,
        processes=processes,
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        capacity=torch.cuda.get_device_properties(device).total_memory if cuda else None,
        speed=measure_matmul_speed(device, DTYPES[config.model.dtype], config.train.threads or torch.get_num_threads()),
    )


def _count_least(
    config: RunConfig, policy: DiffusionPolicy | LanguagePolicy, trainer: Trainer, evaluations: Evaluations
) -> int:
    """Return the evaluations of a micro-batch of one decision; of a text, or where decisions belong together, of one sample."""
    if isinstance(policy, LanguagePolicy):
        return 1
    if trainer.objective.decisions == "each":
        return 1 if policy.setting.value == 1 else 2
    return -(-evaluations.gradient // (config.groups * config.samples_per_group))
