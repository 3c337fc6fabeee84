"""The text and image encoders of a pipeline, which have weights only while prompts are encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from difrl.runtime.quiet_libraries import silenced_libraries


@dataclass(eq=False)
class Encoders:
    """The encoders of a pipeline. Without weights they are on the meta device, where a call of one raises an error."""

    owners: Sequence[Any]
    """The pipelines that hold the encoders as attributes."""
    loaders: Mapping[str, Callable[[], PreTrainedModel]]
    """Name of an encoder -> a function that loads it with its weights, on the CPU."""
    offload: bool = False
    """True if the encoders are on the CPU between two uses."""
    adapted: bool = False
    """True if an adapter was added to them, so that the model's files do not have their weights."""

    _place: str = "meta"
    """Device of the encoders, "meta" without weights."""

    @property
    def modules(self) -> dict[str, PreTrainedModel]:
        """The encoders by name."""
        return {name: getattr(self.owners[0], name) for name in self.loaders}

    @property
    def loaded(self) -> bool:
        """Whether the encoders have weights."""
        return self._place != "meta"

    @contextmanager
    def at_hand(self, device: torch.device | str) -> Iterator[None]:
        """Hold the encoders on a device for the block. Afterwards they stay there, or go to the CPU if `offload` is set."""
        self._move(device)
        try:
            yield
        finally:
            if self.offload:
                self._move("cpu")

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Let the encoders have weights in the block, wherever they are. Afterwards they are as they were before."""
        loaded = self.loaded
        if not loaded:
            self._move("cpu")
        try:
            yield
        finally:
            if not loaded:
                self.drop()

    def keep(self) -> None:
        """Load the encoders for an adapter. Their weights are never dropped."""
        self._move("cpu")
        self.adapted = True

    def drop(self) -> None:
        """Free the memory of the encoders, or that on the accelerator if the model's files do not have their weights."""
        if self.adapted:
            self._move("cpu")
            return
        for part in self.modules.values():
            nn.Module.to(part, "meta")
            part.tie_weights()
        self._place = "meta"

    def _move(self, device: torch.device | str) -> None:
        if not self.loaded:
            for name, load in self.loaders.items():
                with silenced_libraries():
                    part = load()
                for owner in self.owners:
                    setattr(owner, name, part)
            self._place = "cpu"
        if self._place != str(device):
            for part in self.modules.values():
                nn.Module.to(part, device)
        self._place = str(device)
