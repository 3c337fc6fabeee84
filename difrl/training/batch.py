"""The scored samples that a process learns from in a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from difrl.data.rollout import Rollout, ScoredRollout


@dataclass(frozen=True, eq=False)
class Batch:
    """B scored samples with their advantages."""

    scored: ScoredRollout
    advantages: Tensor
    """[B], 0 where the sample is not valid."""
    penalties: Tensor | None = None
    """[B, J], subtracted from the advantage of each decision by anchors whose place is the decision; None without them."""

    @property
    def rollout(self) -> Rollout:
        return self.scored.rollout

    @property
    def groups(self) -> Tensor:
        return self.scored.groups

    def select(self, index: Tensor | slice) -> Batch:
        """Return the rows of an integer or boolean index, or of a slice."""
        penalties = None if self.penalties is None else self.penalties[index]
        return Batch(self.scored.select(index), self.advantages[index], penalties)

    def decision_advantages(self, columns: slice = slice(None)) -> Tensor:
        """Return the advantages of these decisions: [B] where a sample's decisions share one, else [B, J]."""
        if self.penalties is None:
            return self.advantages
        return self.advantages[:, None] - self.penalties[:, columns].to(self.advantages.dtype)


def update_rows(groups: Tensor, update: int, updates: int, groups_per_step: int) -> Tensor:
    """Return which samples belong to an update of a step, bool [B].

    The groups of a step, 0 to `groups_per_step` - 1, are divided by number, so the result does not depend on the number of
    processes.
    """
    return groups * updates // groups_per_step == update
