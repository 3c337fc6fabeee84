"""The contract between a policy's likelihoods and what is minimised.

An objective maps (likelihoods, advantages, groups) to a loss per element, [B, J]; the caller reduces. It
trains whatever the likelihoods came from, because it never learns which model that was.

Some objectives look at a whole group or batch (centring, pairs, an estimated bias). They see the other rows
only through *statistics*: detached tensors, so that a pass without gradient can supply them when a group does
not fit one backward pass. Nothing is lost: whatever F of all rows is wanted, its gradient is sum_i (dF/dl_i)
grad l_i, and dF/dl_i is such a number. The caller's part, in full:

    lik = collapse(policy's likelihoods, objective.decisions)
    loss, metrics = objective(lik, advantages, groups)
    reduce(loss + penalty(lik, coefficients), weights, sum of weights over the step).backward()

and, where groups (objective.scope "group") or the step ("batch") come in several minibatches, first

    all_lik = Likelihoods.cat([collapse(..., objective.decisions) of each minibatch under no_grad])
    statistics = statistics_of(objective, all_lik, advantages, groups)

of which each call of the objective gets its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from difrl.core.likelihoods import Decisions, Likelihoods

Scope = Literal["row", "group", "batch"]
Aggregation = Literal["decision", "sample", "length"]


class Objective(Protocol):
    """A loss per element. Implementations are frozen dataclasses whose fields are the formula's constants."""

    @property
    def decisions(self) -> Decisions:
        """What it is a function of. "each": single decisions, which may be split over minibatches; "mean" or
        "sum": a sample's mean or sum, so that its decisions stay together and are collapsed first."""

    @property
    def scope(self) -> Scope:
        """What statistics run over: "row" has none, "group" needs groups whole on one process, "batch"
        needs every row of the step: gather `summarise`, mask, advantages and groups over processes."""

    @property
    def needs(self) -> frozenset[str]:
        """What it reads of the likelihoods beside logp and mask, in the words of `Likelihoods.tensors`."""

    def summarise(self, lik: Likelihoods) -> dict[str, Tensor]:
        """The detached values, [B, J] each, that statistics are made of; {} if none."""

    def statistics(
        self, rows: Mapping[str, Tensor], mask: Tensor, advantages: Tensor, groups: Tensor
    ) -> dict[str, Tensor]:
        """Detached statistics, [B, J] each, broadcast back to the rows they were made of; {} if none.

        rows: what `summarise` gave, mask [B, J], advantages [B, J], groups [B]; masked elements have no part
          in them.
        """

    def __call__(
        self,
        lik: Likelihoods,
        advantages: Tensor,
        groups: Tensor,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss [B, J] with gradient, metrics: name -> [B, J] detached, reduced by the caller like the loss).

        advantages [B] or [B, J], groups [B]. Without statistics the batch must hold whole groups.
        """


@dataclass(frozen=True)
class RowObjective:
    """Defaults for an objective: one that is a function of single rows and reads the "old" reference."""

    _: KW_ONLY
    decisions: Decisions = "each"

    @property
    def scope(self) -> Scope:
        return "row"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"references/old"})

    def summarise(self, lik: Likelihoods) -> dict[str, Tensor]:
        return {}

    def statistics(
        self, rows: Mapping[str, Tensor], mask: Tensor, advantages: Tensor, groups: Tensor
    ) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class GroupObjective(RowObjective):
    """Defaults for one that compares the log ratios to one reference, D = l_theta - l_reference, within a group.

    Attributes:
      reference: the name of the likelihoods' reference.
    """

    _: KW_ONLY
    reference: str = "base"

    @property
    def scope(self) -> Scope:
        return "group"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({f"references/{self.reference}"})

    def summarise(self, lik: Likelihoods) -> dict[str, Tensor]:
        return {"delta": lik.log_ratio(self.reference).detach()}


def checked(objective: Objective, lik: Likelihoods, advantages: Tensor, groups: Tensor) -> Tensor:
    """The advantages as [B, J], after every check an objective makes of its arguments."""
    lik.require(objective.needs)
    rows, columns = lik.logp.shape
    if objective.decisions != "each" and columns != 1:
        raise ValueError(
            f"the objective is a function of the {objective.decisions} of a sample's decisions but was given "
            f"{columns} of them; call collapse(likelihoods, objective.decisions) first"
        )
    if advantages.requires_grad:
        raise ValueError("advantages carry a gradient, expected constants; detach them")
    if advantages.shape not in ((rows,), (rows, columns)) or groups.shape != (rows,):
        raise ValueError(
            f"advantages have shape {list(advantages.shape)} and groups {list(groups.shape)}, expected "
            f"[{rows}] or [{rows}, {columns}], and [{rows}], after the rows and columns of the likelihoods"
        )
    return advantages.reshape(rows, -1).expand(rows, columns).to(lik.logp.dtype)


def statistics_of(objective: Objective, lik: Likelihoods, advantages: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """The statistics of a batch of whole groups: [B, J] each, to be indexed like the rows.

    `lik` may be the concatenation of minibatches evaluated without gradient. For a batch spread over
    processes, gather `objective.summarise(lik)` and the other arguments and call `objective.statistics`
    itself.
    """
    expanded = checked(objective, lik, advantages, groups)
    with torch.no_grad():
        return objective.statistics(objective.summarise(lik), lik.mask, expanded, groups)


def resolved(
    objective: Objective,
    lik: Likelihoods,
    advantages: Tensor,
    groups: Tensor,
    statistics: Mapping[str, Tensor] | None,
) -> Mapping[str, Tensor]:
    """The statistics given, checked, or else those of this batch."""
    if statistics is None:
        return statistics_of(objective, lik, advantages, groups)
    for name, tensor in statistics.items():
        if tensor.shape != lik.logp.shape or tensor.requires_grad:
            raise ValueError(
                f"statistic {name!r} has shape {list(tensor.shape)}, requires_grad {tensor.requires_grad}; "
                f"expected {list(lik.logp.shape)} without gradient: this minibatch's rows of statistics_of"
            )
    return statistics


def weighted(loss: Tensor, lik: Likelihoods) -> Tensor:
    """The loss times the likelihoods' own weight of each decision, where they have one. [B, J]."""
    return loss if lik.weight is None else loss * lik.weight


def penalty(lik: Likelihoods, coefficients: Mapping[str, float | Tensor]) -> Tensor:
    """sum_a c_a D_a over anchors a: what anchors add to the loss, [B, J]; zeros without anchors.

    coefficients: anchor name -> one number, or one a sample [B] (reward-adaptive), detached.
    """
    total = torch.zeros_like(lik.logp)
    for name, coefficient in coefficients.items():
        factor = torch.as_tensor(coefficient, dtype=lik.logp.dtype, device=lik.logp.device)
        total = total + factor.reshape(-1, 1) * lik[f"divergence/{name}"]
    return total


def aggregation(mask: Tensor, per: Aggregation = "decision") -> tuple[Tensor, Tensor]:
    """(weights [B, J], count): what each decision counts, and what the sum over the whole step is divided by.

                   weight               count
      "decision":  m_ij                 sum_ij m_ij              every decision alike (DAPO, 2503.14476)
      "sample":    m_ij / sum_j m_ij    samples that count       every sample alike (GRPO, 2402.03300)
      "length":    m_ij                 those samples times J    a constant, J the greatest length (Dr.GRPO, 2503.20783)

    Counts of minibatches add up; J is the same in all of them.
    """
    weights, samples = mask.to(torch.float32), mask.any(dim=1).sum()
    if per == "decision":
        return weights, mask.sum()
    if per == "sample":
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=1.0), samples
    if per == "length":
        return weights, samples * mask.shape[1]
    raise ValueError(f"aggregation is {per!r}, expected 'decision', 'sample' or 'length'")


def reduce(values: Tensor, mask: Tensor, count: float | Tensor) -> Tensor:
    """sum_ij m_ij v_ij / count, a scalar: the one reduction of losses and metrics alike.

    Args:
      values: [B, J].
      mask: [B, J] bool, or the weights of `aggregation`. What stands where it is 0 has no effect.
      count: the sum of the mask over *all* micro-batches and processes, so that summing what they return (and
        their gradients) gives the mean over the step however it was split.
    """
    if mask.shape != values.shape:
        raise ValueError(f"mask has shape {list(mask.shape)}, expected {list(values.shape)} as the values have")
    return torch.where(mask != 0, values * mask, 0.0).sum() / count
