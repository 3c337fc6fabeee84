"""`difrl check`: find out whether a recipe can run and roughly what it costs, without loading weights.

The number of evaluations is that of a dry run (dry_run.py), parameters and FLOPs are those of the model on the meta device
(images.py, texts.py), kept memory is that of the trainer's own optimizer and snapshots there, and time a rough range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from difrl.config import RunConfig
from difrl.runtime.dtypes import DTYPES
from difrl.runtime.progress import phase
from difrl.training.cost.dry_run import Evaluations, count_evaluations
from difrl.training.cost.flops import measure_matmul_speed
from difrl.training.cost.images import build_image_cost
from difrl.training.cost.model_cost import ModelCost
from difrl.training.cost.texts import build_text_cost
from difrl.training.inputs import load_inputs


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
        rest = counts.without_gradient * forward + counts.gradient * self.model.training
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
    with phase("building the model without weights"):
        model = (build_text_cost if config.likelihood.kind == "tokens" else build_image_cost)(config, inputs)
    evaluations = count_evaluations(config, model.dry, inputs, processes)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    cuda = device.type == "cuda"
    threads = config.train.threads or torch.get_num_threads()
    return Estimate(
        model=model,
        memory={**model.measure_kept(config), **model.working_memory(model.dry.tally)},
        evaluations=evaluations,
        processes=processes,
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        capacity=torch.cuda.get_device_properties(device).total_memory if cuda else None,
        speed=measure_matmul_speed(device, DTYPES[config.model.dtype], threads),
    )
