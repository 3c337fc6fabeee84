"""A plain Python function as a reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rewards.base import Answer, Metadata, Samples, WithoutDevice


@dataclass(frozen=True)
class Function(WithoutDevice):
    """``call(samples, prompts, metadata, **options)``, which returns a number or None for each sample.

    `samples` are images [B,3,H,W] in [0,1] on the policy's device, or B texts. Which inputs it reads is unknown.
    """

    name: str
    call: Callable[..., Answer]
    options: Mapping[str, object] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Answer:
        """Return the function's result, which `rewards.score` checks."""
        return self.call(samples, prompts, metadata, **self.options)
