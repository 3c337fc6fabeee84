"""`difrl check`: find out whether a recipe can run and roughly what it costs, without loading weights.

The number of evaluations is that of a dry run (dry_run.py), parameters and FLOPs are those of the model on the meta device
(images.py, texts.py), memory is a sum of what is known to be kept, and time a rough range.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from difrl.config import RunConfig
from difrl.config.run import samples_base_at_end
from difrl.config.yaml_source import ConfigError
from difrl.data.modality import MODALITIES
from difrl.data.prompts import load_prompts
from difrl.data.recorded_samples import RecordedGroup, load_recorded_samples
from difrl.policies.errors import ModelError
from difrl.policies.model_paths import is_local_path
from difrl.policies.references import needs_base
from difrl.runtime.dtypes import DTYPES
from difrl.runtime.errors import UserError
from difrl.scoring import build_reward, modality_mismatch
from difrl.scoring.diversity import Diversity
from difrl.training.cost.dry_run import Evaluations, Inputs, count_evaluations
from difrl.training.cost.flops import measure_matmul_speed
from difrl.training.cost.images import build_image_cost
from difrl.training.cost.model_cost import ModelCost
from difrl.training.cost.texts import build_text_cost
from difrl.training.trainer import find_indivisible

T = TypeVar("T")

MODEL_COSTS: Mapping[str, Callable[[RunConfig, Inputs], ModelCost]] = {
    "forward": build_image_cost,
    "reverse": build_image_cost,
    "tokens": build_text_cost,
}
"""likelihood.kind -> builder."""


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
    inputs = _check_inputs(config, processes)
    config = _without_warm_start(config)
    model = MODEL_COSTS[config.likelihood.kind](config, inputs)
    evaluations = count_evaluations(config, model.dry, inputs, processes)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    cuda = device.type == "cuda"
    threads = torch.get_num_threads()
    torch.set_num_threads(config.train.threads or threads)
    try:
        speed = measure_matmul_speed(device, DTYPES[config.model.dtype])
    finally:
        torch.set_num_threads(threads)
    return Estimate(
        model=model,
        memory={**_kept(config, model), **model.working_memory(model.dry.tally)},
        evaluations=evaluations,
        processes=processes,
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        capacity=torch.cuda.get_device_properties(device).total_memory if cuda else None,
        speed=speed,
    )


def _kept(config: RunConfig, model: ModelCost) -> dict[str, int]:
    """Return the bytes that a process keeps from its first step to its last, by name."""
    frozen: dict[str, int] = defaultdict(int)
    for module in model.modules:
        for tensor in (*(p for p in module.parameters() if not p.requires_grad), *module.buffers()):
            if tensor.is_floating_point():
                frozen[f"frozen weights, {str(tensor.dtype).removeprefix('torch.')}"] += tensor.nbytes
    size = sum(p.nbytes for p in model.trained_parameters)
    memory = {**frozen, "trained weights, float32": size, "gradients": size, "AdamW's two moments": 2 * size}
    if config.model.dtype != "float32":
        cast = size * DTYPES[config.model.dtype].itemsize // torch.float32.itemsize
        memory[f"trained weights cast to {config.model.dtype}"] = cast
    # The base is for anchors, and for the sweep and the pictures at the end; LoRA only switches its adapter off.
    base = config.model.train == "full" and (samples_base_at_end(config) or needs_base(config))
    copies = [f"snapshot {name}" for name in config.snapshots] + ["pretrained weights, kept"] * base
    if config.model.copies == "cpu" and copies:  # one at a time comes to the device
        copies = ["copy of the weights in use"]
    teachers = {f"teacher {name}": sum(p.nbytes for p in one.parameters()) for name, one in model.teachers.items()}
    return {**memory, **dict.fromkeys(copies, size), **teachers}


def _without_warm_start(config: RunConfig) -> RunConfig:
    """Return the recipe with a new adapter: one to continue from is taken to have the rank of the recipe."""
    lora = config.model.lora
    if (start := lora.warm_start) is not None and not Path(start).exists() and is_local_path(start):
        raise ModelError(f"model.lora.warm_start: no folder {start!r}; expected a folder or a hub id of a LoRA")
    model = config.model.model_copy(update={"lora": lora.model_copy(update={"warm_start": None})})
    return config.model_copy(update={"model": model})


def _check_inputs(config: RunConfig, processes: int) -> Inputs:
    """Read the prompts and build the rewards of a run. Raise ConfigError with every problem at once."""
    problems = list[str]()
    modality = MODALITIES[config.likelihood.kind]

    def attempt(name: str, work: Callable[[], T], errors: type[Exception] = UserError) -> T | None:
        try:
            return work()
        except errors as error:
            problems.append(f"{name}{error}")
            return None

    recorded, evaluated, rehearsal = list[RecordedGroup](), config.data.evaluation, config.rehearsal
    if config.data.rows == "prompts":
        train = attempt("data.train: ", lambda: load_prompts(config.data.train)) or []
    else:
        recorded = attempt("data.train: ", lambda: load_recorded_samples(config.data, modality)) or []
        train = [group.prompt for group in recorded]
    evaluation = (attempt("data.evaluation: ", lambda: load_prompts(evaluated)) if evaluated else None) or []
    if rehearsal is not None:
        recorded += attempt("rehearsal.train: ", lambda: load_recorded_samples(rehearsal, modality)) or []
    for section, rewards in (("rewards", config.rewards), ("watch", config.watch)):
        for index, member in [(i, m) for i, reward in enumerate(rewards) for m in reward.members]:
            name = f"{section}.{index} ({member.label}): "
            reward = attempt(name, partial(build_reward, member), Exception)  # a reward is anybody's code
            problem = None if reward is None else modality_mismatch(reward, modality)
            problems += [] if problem is None else [name + problem]
    attempt("", lambda: Diversity.build(config.eval.diversity))
    problems += find_indivisible(config, processes)
    if problems:
        raise ConfigError(*problems)
    return Inputs(train, evaluation, recorded)
