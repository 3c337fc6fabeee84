"""Files of tensors in the format of safetensors, written one tensor at a time: a file need never be in memory as a whole.

The bytes are those of safetensors.torch.save_file, which takes all tensors at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
"""Types of tensors by their names in a file. Later ones come first there, so that every tensor is aligned."""
_ORDER = {dtype: -place for place, dtype in enumerate(DTYPES)}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a file, without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Self:
        """Return the spec of a tensor under a name."""
        return cls(name, tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def place(self) -> tuple[int, str]:
        """Key that sorts the tensors of a file."""
        return _ORDER[self.dtype], self.name


def write_tensors(path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor]) -> str:
    """Write a file of tensors that come one at a time, in the order of `specs`, which is that of `TensorSpec.place`.

    Return its SHA-256 when it is on the disk.
    """
    digest, header, end = hashlib.sha256(), {}, 0
    for spec in specs:
        start, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": DTYPES[spec.dtype], "shape": spec.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for spec, tensor in zip(specs, tensors, strict=True):
            assert TensorSpec.of(spec.name, tensor) == spec
            write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
