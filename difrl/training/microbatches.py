"""How a step's decisions are cut into micro-batches, and when a micro-batch knows all its objective needs.

Decisions are [B, J]: samples by decisions. Only objectives of single decisions let a sample's be cut apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from difrl.core import Objective


class Extent(NamedTuple):
    """Of a micro-batch."""

    rows: int
    columns: int


def extent(objective: Objective, columns: int, size: int, group_size: int, whole: bool = False) -> Extent:
    """Of micro-batches of at most `size` decisions (one sample at the least), each sample having `columns`.

    whole: whether a sample's decisions are evaluated in one pass, so that cutting them apart would save nothing.
    Where groups are compared and one fits, whole groups: then their statistics need no pass of their own.
    """
    width = min(columns, size) if objective.decisions == "each" and not whole else columns
    rows = max(1, size // width)
    if objective.scope == "group" and rows >= group_size:
        rows -= rows % group_size
    return Extent(rows, width)


def chunks(mask: Tensor, part: Extent) -> Iterator[tuple[slice, slice]]:
    """Every micro-batch of a mask [B, J]: its rows and its decisions. Slices, so that nothing is copied for it."""
    rows, columns = mask.shape
    for first in range(0, rows, part.rows):
        for start in range(0, columns, part.columns):
            yield slice(first, first + part.rows), slice(start, start + part.columns)


def self_contained(objective: Objective, groups: Tensor, part: Extent) -> bool:
    """Whether every micro-batch of rows with these groups [B] holds all rows its statistics run over.

    Never for statistics of the whole batch, so that what a step costs does not depend on the number of processes.
    """
    if objective.scope != "group":
        return objective.scope == "row"
    whole = sum(len(piece.unique()) for piece in groups.split(part.rows))
    return whole == len(groups.unique())
