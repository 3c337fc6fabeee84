"""`difrl check`: whether a recipe can run, and roughly what it will cost, without loading weights.

Counts (parameters, model evaluations, FLOPs) follow from the configuration, memory is a sum of what is known to be kept, time
is a rough range. The parts that depend on the modality are in difrl/training/cost/images.py and difrl/training/cost/texts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from difrl.config import DataConfig, RehearsalConfig, RunConfig
from difrl.config.load import ConfigError
from difrl.data.jsonl import DataFileError
from difrl.data.modality import MODALITIES
from difrl.data.prompts import load_prompts
from difrl.data.recorded_samples import load_recorded_samples
from difrl.policies.flops import measure_matmul_speed
from difrl.runtime.dtypes import DTYPES
from difrl.scoring import build_reward, modality_mismatch
from difrl.scoring.diversity import Diversity
from difrl.training.cost.images import image_parts
from difrl.training.cost.parts import Inputs, Parts
from difrl.training.cost.plan_images import Evaluations
from difrl.training.cost.texts import text_parts

T = TypeVar("T")

__all__ = ["Estimate", "Evaluations", "estimate"]

PARTS: Mapping[str, Callable[[RunConfig, Inputs, int], Parts]] = {
    "forward": image_parts,
    "reverse": image_parts,
    "tokens": text_parts,
}
"""By likelihood.kind."""


@dataclass(frozen=True)
class Estimate(Parts):
    """What a run would cost."""

    processes: int
    device: str
    capacity: int | None
    """Bytes of the device, where it says."""
    speed: float
    """FLOP/s of a large matrix product on the device, measured."""

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Rough bounds of the model's time in a step; the upper one has every draw that collect allows."""
        counts = self.evaluations
        rest = counts.references * self.forward + counts.gradient * self.training
        return self._seconds(counts.rollout * self.forward + rest, counts.draws * counts.rollout * self.forward + rest)

    @property
    def run_seconds(self) -> tuple[float, float]:
        """The same of the whole run, evaluations and reference samples included."""
        counts = self.evaluations
        steps = counts.steps
        once = self._seconds(counts.evaluation * self.forward, (counts.evaluation + counts.compared) * self.forward)
        return steps * self.step_seconds[0] + once[0], steps * self.step_seconds[1] + once[1]

    def _seconds(self, least: float, most: float) -> tuple[float, float]:
        low, high = self.efficiency
        return least / (self.processes * self.speed * high), most / (self.processes * self.speed * low)


def estimate(config: RunConfig, processes: int = 1) -> Estimate:
    """Checks what can be checked without weights and estimates the rest; raises ConfigError or ModelError."""
    inputs = _check_inputs(config, processes)
    parts = PARTS[config.likelihood.kind](config, inputs, processes)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    cuda = device.type == "cuda"
    return Estimate(
        **vars(parts),
        processes=processes,
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        capacity=torch.cuda.get_device_properties(device).total_memory if cuda else None,
        speed=_speed(device, DTYPES[config.model.dtype], config.train.threads),
    )


def _check_inputs(config: RunConfig, processes: int) -> Inputs:
    """Prompts, rewards and processes, every problem at once; returns the prompts."""
    problems = list[str]()
    medium = MODALITIES[config.likelihood.kind]
    drawn = config.data.rows == "prompts"
    train = _read("data.train", lambda: load_prompts(config.data.train), problems) if drawn else []
    evaluated = config.data.evaluation
    evaluation = _read("data.evaluation", lambda: load_prompts(evaluated), problems) if evaluated else []
    files: Mapping[str, DataConfig | RehearsalConfig | None] = {
        "data": None if drawn else config.data,
        "rehearsal": config.rehearsal,
    }
    examples = {
        name: _read(f"{name}.train", partial(load_recorded_samples, rows, medium), problems)
        for name, rows in files.items()
        if rows is not None
    }
    for section, rewards in (("rewards", config.rewards), ("watch", config.watch)):
        for index, reward in enumerate(rewards):
            for member in reward.members:
                try:
                    problem = modality_mismatch(build_reward(member), medium)
                except Exception as error:  # a reward is anybody's code
                    problem = str(error)
                if problem is not None:
                    problems.append(f"{section}.{index} ({member.label}): {problem}")
    try:
        Diversity.build(config.eval.diversity)
    except ConfigError as error:
        problems.append(str(error))
    groups, updates = config.groups, config.train.updates_per_step
    if groups % (processes * updates):
        problems.append(
            f"data.prompts_per_step: found {groups}{_branched(config)}, expected a multiple of {processes} processes times "
            f"{updates} updates, "
            "since every process has whole groups in every update; change it, or start another number of processes"
        )
    if problems:
        raise ConfigError(*problems)
    recorded = [example for found in examples.values() for example in found]
    return Inputs(train if drawn else [e.prompt for e in examples["data"]], evaluation, recorded)


def _read(name: str, read: Callable[[], list[T]], problems: list[str]) -> list[T]:
    """What a file holds; nothing, and a problem more, where it cannot be read."""
    try:
        return read()
    except DataFileError as error:
        problems.append(f"{name}: {error}")
        return []


def _branched(config: RunConfig) -> str:
    return f" with their {config.branches} branches each" if config.branches > 1 else ""


def _speed(device: torch.device, dtype: torch.dtype, threads: int | None) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return measure_matmul_speed(device, dtype)
    finally:
        torch.set_num_threads(before)
