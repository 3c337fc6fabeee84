"""Errors that count as a shortage of memory."""

from __future__ import annotations

import pytest
import torch

from difrl.runtime.memory import MemoryShortage, enough_for


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried …"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
    ids=["python", "cuda", "cpu", "cublas"],
)
def test_a_shortage_comes_with_advice(error: Exception) -> None:
    with pytest.raises(MemoryShortage, match=r"in the update: lower x\. \(") as caught, enough_for("update", "lower x"):
        raise error
    assert caught.value.__cause__ is error


def test_a_real_one_of_the_cpu() -> None:
    with pytest.raises(MemoryShortage), enough_for("update", "lower x"):
        torch.empty(2**60, dtype=torch.uint8)


def test_another_error_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), enough_for("update", "lower x"):
        raise RuntimeError("shapes differ")
