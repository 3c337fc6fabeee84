"""Cost of the passes of a model, found without its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from difrl.training.cost.dry_run import DryPolicy, Tally


@dataclass(frozen=True)
class ModelCost:
    """The model of a run on the meta device, and the cost of its passes."""

    name: str
    """Class, and place of the files."""
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
    teachers: Mapping[str, nn.Module] = field(default_factory=dict)
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
