"""A plain Python function as a reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rewards.base import Answer, Metadata, Samples


@dataclass(frozen=True)
class Function:
    """``call(samples, prompts, metadata, **options)``, which returns a number or None for each sample.

    `samples` are images [B,3,H,W] in [0,1] on the policy's device, or B texts. What it needs is not known beforehand.
    """

    name: str
    call: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Function:
        """Nothing to move: a function finds the samples' device by itself."""
        return self

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Answer:
        """What the function says; `rewards.score` checks it."""
        found: Answer = self.call(samples, prompts, metadata, **self.options)
        return found
