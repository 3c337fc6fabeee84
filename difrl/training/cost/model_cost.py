"""Cost of a model, found without its weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from difrl.config import RunConfig
from difrl.policies.snapshots import Snapshots
from difrl.runtime.dtypes import DTYPES
from difrl.training.cost.dry_run import DryPolicy, Tally
from difrl.training.trainer import build_optimizer


@dataclass(frozen=True)
class Wording:
    """Words of the printed table that depend on what a model makes."""

    heading: str
    rollout: str
    unit: str
    left_out: str


@dataclass(frozen=True)
class ModelCost:
    """The model of a run on the meta device, and the cost of its passes."""

    name: str
    """Class, and place of the files."""
    snapshots: Snapshots
    """The trained parameters, and the copies of them that a run keeps."""
    modules: Sequence[nn.Module]
    """The modules of the policy but for its teachers."""
    dry: DryPolicy
    forward: int
    """FLOPs of an evaluation, or of a token, without gradient."""
    training: int
    """The same with gradient, backward pass included."""
    working_memory: Callable[[Tally], Mapping[str, int]]
    """Samples of a dry run -> bytes of what is alive within a step, by name."""
    efficiency: tuple[float, float]
    """Share of the speed of a large matrix product that a model reaches, at worst and at best."""
    wording: Wording
    teachers: Mapping[str, nn.Module] = field(default_factory=dict)
    generated: int | None = None
    """Tokens that a step generates; None for images."""
    notes: Sequence[str] = ()
    """Facts about the model that a user may not expect."""

    @property
    def trained(self) -> int:
        """Number of parameters that are trained."""
        return sum(p.numel() for p in self.snapshots.parameters.values())

    @property
    def frozen(self) -> int:
        """Number of parameters that are not trained, those of encoders and teachers included."""
        modules = [*self.modules, *self.teachers.values()]
        return sum(p.numel() for module in modules for p in module.parameters() if not p.requires_grad)

    def measure_kept(self, config: RunConfig) -> dict[str, int]:
        """Return the bytes that a process keeps from its first step to its last, by name.

        They are those of the modules, the snapshots, and the trainer's optimizer after a step.
        """
        trained = list(self.snapshots.parameters.values())
        optimizer = build_optimizer(trained, config.train)
        for p in trained:
            p.grad = torch.empty_like(p)
        optimizer.step()
        moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.is_meta]
        memory: dict[str, int] = defaultdict(int)
        for module in self.modules:
            for tensor in (*(p for p in module.parameters() if not p.requires_grad), *module.buffers()):
                if tensor.is_floating_point():
                    memory[f"frozen weights, {str(tensor.dtype).removeprefix('torch.')}"] += tensor.nbytes
        memory["trained weights, float32"] = _count_bytes(trained)
        memory["gradients"] = sum(p.grad.nbytes for p in trained if p.grad is not None)
        memory["AdamW's two moments"] = _count_bytes(moments)
        if config.model.dtype != "float32":
            cast = self.trained * DTYPES[config.model.dtype].itemsize
            memory[f"trained weights cast to {config.model.dtype}"] = cast
        memory |= self.snapshots.device_bytes()
        return memory | {f"teacher {name}": _count_bytes(t.parameters()) for name, t in self.teachers.items()}


def _count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
