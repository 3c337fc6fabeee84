"""Tensors on their way into the files of a checkpoint and out of them, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from difrl.runtime.distributed import DistributedContext
from difrl.runtime.tensor_file import DTYPES, TensorSpec
from difrl.training.checkpoint.folder import DamagedCheckpoint, readable


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint. All processes gather it when its turn comes, and the main process keeps the result."""

    spec: TensorSpec
    gather: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        """Return the entry of a tensor that the main process has."""
        return cls(TensorSpec.of(name, tensor), lambda: tensor)


class TensorFile:
    """A file of a checkpoint, which the main process reads for all."""

    def __init__(self, place: Path, name: str, processes: DistributedContext) -> None:
        """Open a file, on all processes. Raise DamagedCheckpoint on all if it cannot be read."""
        self.place, self.name, self.processes = place, name, processes
        self.specs: dict[str, TensorSpec] = processes.from_main(self._open)
        """The tensors by name."""

    def _open(self) -> dict[str, TensorSpec]:
        types = {name: dtype for dtype, name in DTYPES.items()}
        try:
            with readable(self.place):
                self._file = safe_open(self.place / f"{self.name}.safetensors", "pt")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            return {n: TensorSpec(n, types[s.get_dtype()], tuple(s.get_shape())) for n, s in slices.items()}
        except SafetensorError as error:
            raise DamagedCheckpoint(self.place, f"{self.name}.safetensors cannot be read ({error})") from error

    def get(self, name: str) -> Tensor:
        """Return a tensor, on the main process."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def read(self, name: str) -> Tensor | None:
        """Return a tensor on the main process, None on the others."""
        return self.get(name) if self.processes.is_main else None

    def receive(self, name: str) -> Tensor:
        """Return a tensor on every process. All must call it."""
        spec, tensor = self.specs[name], self.read(name)
        sent = torch.empty(spec.shape, dtype=spec.dtype) if tensor is None else tensor
        # As bytes: not every backend knows every type.
        received = self.processes.broadcast(sent.reshape(-1).view(torch.uint8).to(self.processes.device))
        return received.view(spec.dtype).reshape(spec.shape)
