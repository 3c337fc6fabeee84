"""Videos that are decoded when they are read, so that memory holds the frames of a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Decode = Callable[[Sequence[Any]], Tensor]
"""Sources of B videos -> their frames [B, F, 3, H, W] in [0, 1], float32."""


@dataclass(frozen=True, eq=False)
class Videos:
    """B videos: the sources that they are decoded from, such as latents or files."""

    sources: tuple[Any, ...]
    decode: Decode
    batch: int
    """Number of videos that are in memory at once."""
    device: torch.device | str = "cpu"
    """Place of decoded frames."""

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, rows: slice) -> Videos:
        return replace(self, sources=self.sources[rows])

    def select(self, rows: Sequence[int]) -> Videos:
        """Return the videos of these rows."""
        return replace(self, sources=tuple(self.sources[row] for row in rows))

    def batches(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows with their frames [b, F, 3, H, W], `batch` videos at a time."""
        for start in range(0, len(self), self.batch):
            rows = slice(start, min(start + self.batch, len(self)))
            yield rows, self.decode(self.sources[rows]).to(self.device)

    def to(self, device: torch.device | str) -> Videos:
        """Return the videos with decoded frames on a device."""
        return replace(self, device=device)

    @classmethod
    def cat(cls, parts: Sequence[Videos]) -> Videos:
        """Concatenate parts with sources of one kind."""
        return replace(parts[0], sources=tuple(source for part in parts for source in part.sources))
