"""Cost of the passes of a model, found without its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from difrl.config import RunConfig
from difrl.training.cost.dry_run import DryPolicy

ENCODING, ROLLOUT, DECODING, UPDATE = "encoding", "rollout", "decoding", "update"
"""Phases of a run, each with memory of its own."""


@dataclass(frozen=True)
class ModelCost:
    """The model of a run on the meta device, and the cost of its passes."""

    name: str
    """Class, and place of the files."""
    modules: Sequence[nn.Module]
    """The modules of the policy, encoders included, but for its teachers."""
    dry: DryPolicy
    forward: int
    """FLOPs of an evaluation, or of a token, without gradient."""
    training: int
    """The same with gradient, backward pass included."""
    working_memory: Callable[[RunConfig, int], Mapping[str, Mapping[str, int]]]
    """Settings and the samples with gradient of a pass -> phase of a step -> bytes of what is alive in it, by name."""
    efficiency: tuple[float, float]
    """Share of the speed of a large matrix product that a model reaches, at worst and at best."""
    teachers: Mapping[str, nn.Module] = field(default_factory=dict)
    encoders: Sequence[nn.Module] = ()
    """Modules that are on the device only while prompts are encoded."""
    in_float32: Sequence[nn.Module] = ()
    """Modules that are in float32 under every setting."""
    generated: int | None = None
    """Tokens that a step generates; None for images."""
    notes: Sequence[str] = ()
    """Facts about the model that a user may not expect."""

    @property
    def trained(self) -> int:
        """Number of parameters that are trained."""
        return self._count(trained=True)

    @property
    def frozen(self) -> int:
        """Number of parameters that are not trained, those of encoders and teachers included."""
        return self._count(trained=False)

    def _count(self, *, trained: bool) -> int:
        modules = [*self.modules, *self.teachers.values()]
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad is trained)
