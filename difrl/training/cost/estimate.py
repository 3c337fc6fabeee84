"""`difrl check`: find out whether a recipe can run and roughly what it costs, without loading weights.

The policy and the trainer are those of the run, on the meta device: they refuse what a run refuses, and their tensors are the
memory that a process keeps. FLOPs are those of a pass there (images.py, texts.py), the number of evaluations is that of a dry
run (dry_run.py), and time a rough range.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from difrl.config import RunConfig
from difrl.config.run import samples_base_at_end
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.language.policy import LanguagePolicy
from difrl.policies.layout import networks
from difrl.policies.load import load_policy
from difrl.policies.quantization import count_frozen_bytes
from difrl.policies.rollout_precision import quantizable
from difrl.runtime.dtypes import DTYPES
from difrl.training.cost.dry_run import AlikeProcesses, Evaluations, count_evaluations
from difrl.training.cost.flops import measure_matmul_speed
from difrl.training.cost.images import count_image_cost
from difrl.training.cost.model_cost import ModelCost
from difrl.training.cost.texts import count_text_cost
from difrl.training.inputs import load_inputs
from difrl.training.optimizers import count_state_bytes
from difrl.training.trainer import Trainer


@dataclass(frozen=True)
class Estimate:
    """Cost of a run."""

    model: ModelCost
    memory: Mapping[str, int]
    """Bytes that a process keeps, by name."""
    evaluations: Evaluations
    processes: int
    device: str
    capacity: int | None
    """Bytes of the device, where known."""
    speed: float
    """FLOP/s of a large matrix product on the device, measured."""

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
        memory={
            **_measure_kept(config, model, trainer, networks(policy.module)),
            **_measure_quantized(config, policy),
            **model.working_memory(model.dry.tally),
        },
        evaluations=evaluations,
        processes=processes,
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        capacity=torch.cuda.get_device_properties(device).total_memory if cuda else None,
        speed=measure_matmul_speed(device, DTYPES[config.model.dtype], config.train.threads or torch.get_num_threads()),
    )


def _measure_kept(
    config: RunConfig, model: ModelCost, trainer: Trainer, trainable: Sequence[nn.Module]
) -> dict[str, int]:
    """Return the bytes that a process keeps from its first step to its last, by name. trainable: the networks of the policy."""
    for p in trainer.parameters:
        p.grad = torch.empty_like(p)
    trainer.optimizer.step()
    memory: dict[str, int] = defaultdict(int)
    quantize = config.model.quantize
    for module in model.modules:
        if module in trainable and config.model.offload == "weights":
            continue  # in CPU memory
        for format, size in count_frozen_bytes(module, quantize if module in trainable else "none").items():
            memory[f"frozen weights, {format}"] += size
    trained = sum(p.nbytes for p in trainer.parameters)
    memory |= {"trained weights, float32": trained, "gradients": trained}
    name = "AdamW's two moments" if config.train.optimizer == "adamw" else f"moments of {config.train.optimizer}"
    memory[name] = count_state_bytes(trainer.optimizer)
    if config.model.dtype != "float32":
        memory[f"trained weights cast to {config.model.dtype}"] = model.trained * DTYPES[config.model.dtype].itemsize
    memory |= trainer.policy.snapshots.device_bytes()
    return memory | {f"teacher {n}": sum(count_frozen_bytes(t, quantize).values()) for n, t in model.teachers.items()}


def _measure_quantized(config: RunConfig, policy: DiffusionPolicy | LanguagePolicy) -> dict[str, int]:
    """Return the bytes of the weights that draw the samples of training in another precision, of a byte each."""
    if config.rollout.precision == "same":
        return {}
    return {
        f"weights of rollouts, {config.rollout.precision}": sum(
            layer.weight.numel() for layer in quantizable(policy.module)
        )
    }
