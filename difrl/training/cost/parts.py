"""What the estimate of a run is made of, whatever the run trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from difrl.config import RunConfig
from difrl.data.prompts import Prompt
from difrl.data.recorded_samples import RecordedGroup
from difrl.runtime.dtypes import DTYPES
from difrl.training.cost.plan_images import Evaluations


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides its model."""

    train: Sequence[Prompt]
    evaluation: Sequence[Prompt]
    recorded: Sequence[RecordedGroup] = ()
    """Samples of files, to learn from or to rehearse."""


@dataclass(frozen=True)
class Words:
    """How the table speaks of evaluations."""

    heading: str
    rollout: str
    unit: str
    left_out: str
    counted: Mapping[str, int] = field(default_factory=dict)
    """Further counts of a step."""


@dataclass(frozen=True)
class Parts:
    """What a modality knows of a run."""

    model: str
    """Class and where it is."""
    frozen: int
    """Parameters that are not trained, text encoders and autoencoder, or teachers, included."""
    trained: int
    memory: Mapping[str, int]
    """What a process keeps -> bytes."""
    evaluations: Evaluations
    forward: int
    """FLOPs of an evaluation without gradient."""
    training: int
    """FLOPs of an evaluation with gradient, its backward pass included."""
    words: Words
    efficiency: tuple[float, float]
    """What share of the speed of a large matrix product a model reaches, at worst and at best."""


def kept(
    config: RunConfig, modules: Sequence[nn.Module], trained: Sequence[nn.Parameter], base: bool
) -> dict[str, int]:
    """Bytes of what a process keeps from its first step to its last. base: whether pretrained weights are asked for."""
    frozen: dict[str, int] = defaultdict(int)
    parameters = [p for part in modules for p in part.parameters() if not p.requires_grad]
    for tensor in [*parameters, *(b for part in modules for b in part.buffers())]:
        frozen[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    memory = {f"frozen weights, {dtype}": size for dtype, size in frozen.items() if "float" in dtype}
    count = sum(p.numel() for p in trained)
    memory |= {"trained weights, float32": 4 * count, "gradients": 4 * count, "AdamW's two moments": 8 * count}
    if config.model.dtype != "float32":
        memory[f"trained weights cast to {config.model.dtype}"] = DTYPES[config.model.dtype].itemsize * count
    full = config.model.train == "full"
    copies = [f"snapshot {name}" for name in config.snapshots] + ["pretrained weights, kept"] * (full and base)
    if config.model.copies == "cpu":  # one at a time comes to the device
        copies = ["copy of the weights in use"] if copies else []
    return memory | dict.fromkeys(copies, 4 * count)
