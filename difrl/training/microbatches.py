"""Micro-batches: blocks of samples and decisions that are evaluated in one pass.

Decisions are [B, J]: samples by decisions. The decisions of a sample are split only if the objective is a function of single
decisions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from difrl.core import Objective


class Extent(NamedTuple):
    """Size of a micro-batch."""

    rows: int
    """Number of samples."""
    columns: int
    """Number of decisions of each."""


def extent(objective: Objective, columns: int, size: int, group_size: int, whole: bool = False) -> Extent:
    """Return the size of micro-batches.

    If the objective compares the samples of a group and a group fits, micro-batches hold whole groups: then statistics need
    no pass of their own.

    Args:
      objective: what the micro-batches are for.
      columns: number of decisions of a sample.
      size: maximum number of decisions of a micro-batch, which holds at least one sample or, if it can be split, one decision.
      group_size: number of samples of a group.
      whole: whether the decisions of a sample are evaluated in one pass, so that splitting them would save nothing.
    """
    width = min(columns, size) if objective.decisions == "each" and not whole else columns
    rows = max(1, size // width)
    if objective.scope == "group" and rows >= group_size:
        rows -= rows % group_size
    return Extent(rows, width)


def chunks(mask: Tensor, part: Extent) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of each micro-batch of a mask [B, J], as slices, so that selecting them copies nothing."""
    rows, columns = mask.shape
    for first in range(0, rows, part.rows):
        for start in range(0, columns, part.columns):
            yield slice(first, first + part.rows), slice(start, start + part.columns)


def self_contained(objective: Objective, groups: Tensor, part: Extent) -> bool:
    """Return whether every micro-batch holds all rows that its statistics depend on, for samples of these groups [B].

    Never for statistics of the whole batch, so that the cost of a step does not depend on the number of processes.
    """
    if objective.scope != "group":
        return objective.scope == "row"
    whole = sum(len(piece.unique()) for piece in groups.split(part.rows))
    return whole == len(groups.unique())
