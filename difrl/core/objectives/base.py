"""The contract between a policy's likelihoods and the loss that is minimised.

An objective maps likelihoods, advantages and groups to a loss per element, [B, J]; the caller reduces it. Nothing here
depends on the kind of model that the likelihoods come from. To write an objective, derive a frozen dataclass from
`Objective`: its fields are the constants of the formula, `loss_and_metrics` is the formula, and `needs` lists the
terms of `Likelihoods` that it reads. For example, the policy gradient by importance sampling:

    @dataclass(frozen=True)
    class ImportanceSampling(Objective):  # L_ij = -A_i rho_ij, rho = exp(l_theta - l_old)
        def loss_and_metrics(self, lik, advantages, statistics):
            ratio = lik.log_ratio("old").exp()
            return -advantages * ratio, {"ratio": ratio.detach()}

Some objectives depend on a whole group or batch (centring, pairs, an estimated bias). They see the other rows only
through *statistics*: detached tensors, which a pass without gradient can supply when a group does not fit into one
backward pass. Nothing is lost by this: the gradient of any function F of all rows is sum_i (dF/dl_i) grad l_i, and
dF/dl_i is such a tensor. The caller's part, in full:

    lik = reduce_over_decisions(likelihoods of the policy, objective.decisions)
    loss, metrics = objective(lik, advantages, groups)
    weights, count = aggregation_weights(lik.mask)  # count summed over the step
    weighted_mean(loss + anchor_penalty(lik, coefficients), weights, count).backward()

Where groups (objective.scope "group") or the step ("batch") are split over several minibatches, a pass before it computes

    whole = Likelihoods.cat([reduce_over_decisions(...) of each minibatch under no_grad])
    statistics = get_statistics(objective, whole, advantages, groups)

and each call of the objective receives its rows of the statistics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from difrl.core.likelihoods import DecisionReduction, Likelihoods

Scope = Literal["row", "group", "batch"]
Tensors = Mapping[str, Tensor]
LossAndMetrics = tuple[Tensor, dict[str, Tensor]]
"""(loss [B, J] with gradient, metrics: name -> [B, J] detached, reduced by the caller like the loss)."""


@dataclass(frozen=True)
class Objective(ABC):
    """A loss per element. The defaults are those of a function of single rows that reads the "old" reference.

    Attributes:
      decisions: "each" for a function of single decisions, which may be split over minibatches; "mean" or "sum" for a
        function of a sample's mean or sum: its decisions stay together, and the caller reduces them first.
    """

    _: KW_ONLY
    decisions: DecisionReduction = "each"

    @property
    def scope(self) -> Scope:
        """Rows on which the loss of a row depends. "row": itself, so there are no statistics. "group": the rows of its group,
        which one process must hold whole. "batch": all rows of the step, gathered over processes."""
        return "row"

    @property
    def needs(self) -> frozenset[str]:
        """Names of the likelihoods' terms that are read beside logp and mask."""
        return frozenset({"references/old"})

    @property
    def clip_range(self) -> float:
        """`excursion` at which the loss changes in kind: it is clipped, masked or saturated. 1 if it never is."""
        return 1.0

    def excursion(self, lik: Likelihoods) -> Tensor:
        """Return |ρ − 1|, [B, J], or the distance from its value at theta = old of the quantity that is clipped instead."""
        return lik.log_ratio("old").expm1().abs()

    def summarise(self, lik: Likelihoods) -> dict[str, Tensor]:
        """Return the detached values, [B, J] each, that the statistics are computed from; {} if none."""
        return {}

    def statistics(self, rows: Tensors, mask: Tensor, advantages: Tensor, groups: Tensor) -> dict[str, Tensor]:
        """Return detached statistics, [B, J] each, broadcast back to the rows that they were computed from; {} if none.

        Args:
          rows: results of `summarise`, [B, J] each.
          mask, advantages: [B, J]; masked elements have no part in the statistics.
          groups: [B] ids.
        """
        return {}

    @abstractmethod
    def loss_and_metrics(self, lik: Likelihoods, advantages: Tensor, statistics: Tensors) -> LossAndMetrics:
        """Evaluate the formula. Likelihoods, advantages and statistics [B, J]; the caller has validated them.

        The likelihoods' own weight of each decision is applied afterwards.
        """

    def __call__(
        self,
        lik: Likelihoods,
        advantages: Tensor,
        groups: Tensor,
        statistics: Tensors | None = None,
    ) -> LossAndMetrics:
        """Return the weighted loss, [B, J], and its metrics.

        Args:
          lik: [B, J].
          advantages: [B] or [B, J].
          groups: [B] ids.
          statistics: the rows of this minibatch of `get_statistics`. None: the batch holds whole groups.
        """
        expanded = validate_inputs(self, lik, advantages, groups)
        if statistics is None:
            statistics = get_statistics(self, lik, advantages, groups)
        for name, tensor in statistics.items():
            if tensor.shape != lik.logp.shape or tensor.requires_grad:
                raise ValueError(
                    f"statistic {name!r} has shape {list(tensor.shape)}, requires_grad {tensor.requires_grad}; "
                    f"expected {list(lik.logp.shape)} without gradient: this minibatch's rows of get_statistics"
                )
        loss, metrics = self.loss_and_metrics(lik, expanded, statistics)
        return (loss * lik["weight"] if "weight" in lik.terms else loss), metrics


@dataclass(frozen=True)
class GroupObjective(Objective):
    """Compare the log ratios to one reference, D = l_theta - l_reference, within each group.

    Attributes:
      reference: name of the likelihoods' reference.
    """

    _: KW_ONLY
    reference: str = "base"

    scope = "group"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({f"references/{self.reference}"})

    def excursion(self, lik: Likelihoods) -> Tensor:
        """Return |D|, [B, J]."""
        return lik.log_ratio(self.reference).abs()

    def summarise(self, lik: Likelihoods) -> dict[str, Tensor]:
        return {"delta": lik.log_ratio(self.reference).detach()}


def validate_inputs(objective: Objective, lik: Likelihoods, advantages: Tensor, groups: Tensor) -> Tensor:
    """Check the arguments of an objective, and return the advantages as [B, J]. ValueError where they do not fit."""
    lik.require(objective.needs)
    rows, columns = lik.logp.shape
    if objective.decisions != "each" and columns != 1:
        raise ValueError(
            f"the objective is a function of the {objective.decisions} of a sample's decisions but was given "
            f"{columns} of them; call reduce_over_decisions(likelihoods, objective.decisions) first"
        )
    if advantages.requires_grad:
        raise ValueError("advantages carry a gradient, expected constants; detach them")
    if advantages.shape not in ((rows,), (rows, columns)) or groups.shape != (rows,):
        raise ValueError(
            f"advantages have shape {list(advantages.shape)} and groups {list(groups.shape)}, expected "
            f"[{rows}] or [{rows}, {columns}], and [{rows}], after the rows and columns of the likelihoods"
        )
    return advantages.reshape(rows, -1).expand(rows, columns).to(lik.logp.dtype)


@torch.no_grad()
def get_statistics(objective: Objective, lik: Likelihoods, advantages: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """Return the statistics of a batch of whole groups, [B, J] each, to be indexed like its rows.

    `lik` may be the concatenation of minibatches evaluated without gradient. For a batch spread over
    processes, gather `objective.summarise(lik)` and the other arguments, and call `objective.statistics`.
    """
    expanded = validate_inputs(objective, lik, advantages, groups)
    return objective.statistics(objective.summarise(lik), lik.mask, expanded, groups)
