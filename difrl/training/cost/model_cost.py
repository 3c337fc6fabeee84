"""Cost of a model, found without its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from difrl.training.cost.dry_run import DryPolicy, Tally


@dataclass(frozen=True)
class Wording:
    """Words of the printed table that depend on what a model makes."""

    heading: str
    rollout: str
    unit: str
    left_out: str


@dataclass(frozen=True)
class ModelCost:
    """A model on the meta device, and the cost of its passes."""

    name: str
    """Class, and place of the files."""
    modules: Sequence[nn.Module]
    trained_parameters: Sequence[nn.Parameter]
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

    @property
    def trained(self) -> int:
        """Number of parameters that are trained."""
        return sum(p.numel() for p in self.trained_parameters)

    @property
    def frozen(self) -> int:
        """Number of parameters that are not trained, those of encoders and teachers included."""
        modules = [*self.modules, *self.teachers.values()]
        return sum(p.numel() for module in modules for p in module.parameters() if not p.requires_grad)
