"""Communication between the processes of a run, through accelerate. With one process every function is the identity.

Gradients are summed here, once an update, not by a DistributedDataParallel wrapper. So passes under other weights need no
special treatment, and a loss that is divided by the global count gives the same gradient as one process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from difrl.runtime.errors import UserError
from difrl.runtime.launcher import FSDP, Shard, read_shard
from rewards import RewardError

T = TypeVar("T")


class ProcessError(UserError):
    """Another process failed in a part of the step that all processes share."""


class DistributedContext:
    """The processes of a run, seen from this one."""

    shard: Shard | None = None
    """The value of `model.shard` that the launcher asks for; None if it asks for nothing."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.shard = read_shard(os.environ)
        asked = os.environ.pop(FSDP, None)  # the policy shards its model; accelerate would expect to do so
        self.accelerator = accelerator or Accelerator()
        if asked is not None:
            os.environ[FSDP] = asked

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def count(self) -> int:
        """Number of processes."""
        count: int = self.accelerator.num_processes
        return count

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        rank: int = self.accelerator.process_index
        return rank

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and the display."""
        is_main: bool = self.accelerator.is_main_process
        return is_main

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the rows of all processes in the order of their ranks. The shape must be the same on every process."""
        gathered: Tensor = self.accelerator.gather(tensor.contiguous())
        return gathered

    def gather_ragged(self, tensor: Tensor) -> list[Tensor]:
        """Return the rows of every process in the order of their ranks. Their number may differ, and be 0."""
        counts = self.gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
        padding = tensor.new_zeros(max(1, *counts) - len(tensor), *tensor.shape[1:])
        gathered = self.gather(torch.cat([tensor, padding])).chunk(self.count)
        return [part[:count] for part, count in zip(gathered, counts, strict=True)]

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Raise an error on every process if a reward fails in the block on one, so that no process waits for it."""
        failure = None
        try:
            yield
        except RewardError as error:
            failure = error
        if self.any(failure is not None):
            raise failure or ProcessError("a reward failed on another process; its message is among the output above")

    def gather_objects(self, value: T) -> list[T]:
        """Return the value of every process in the order of their ranks. It must be picklable, and small."""
        values: list[T] = gather_object([value])
        return values

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return the main process's tensor. All processes give one of its shape and type."""
        received: Tensor = broadcast(tensor)
        return received

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Return the result of `work` on the main process, None on the others. Raise an error on all of them if it fails."""
        result, refusal = None, None
        if self.is_main:
            try:
                result = work()
            except UserError as error:
                refusal = error
        if self.any(refusal is not None):
            raise refusal or ProcessError("the main process failed; its message is among the output above")
        return result

    def from_main(self, work: Callable[[], T]) -> T:
        """Return the result of `work` on the main process, small and picklable, on all. Raise an error on all if it fails."""
        result = self.gather_objects(self.on_main(work))[0]
        return cast(T, result)

    def local_rows(self, gathered: Tensor) -> Tensor:
        """Return the rows of a gathered tensor that come from this process."""
        return gathered.chunk(self.count)[self.rank]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over processes."""
        total: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return total

    def all_reduce_sums(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Sum scalars over processes. The names must be the same on every process."""
        if not values:
            return {}
        total = self.sum(torch.stack([v.detach().double().to(self.device) for v in values.values()]))
        return dict(zip(values, total.tolist(), strict=True))

    def masked_means(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean of each column over processes, without its NaN values; NaN for a column without other values."""
        valid = {name: ~column.isnan() for name, column in columns.items()}
        totals = self.all_reduce_sums(
            {name: torch.where(valid[name], column, 0.0).double().sum() for name, column in columns.items()}
        )
        counts = self.all_reduce_sums({name: mask.sum() for name, mask in valid.items()})
        return {name: totals[name] / counts[name] if counts[name] else math.nan for name in columns}

    def all(self, flag: bool) -> bool:
        """Return whether the flag is set on every process."""
        return int(self.sum(torch.tensor(int(flag), device=self.device))) == self.count

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on some process."""
        return not self.all(not flag)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over processes, in messages of about BUCKET bytes."""
        parameters = list(parameters)
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.count == 1:
            return
        for bucket in _buckets(parameters):
            flat = self.sum(torch.cat([p.grad.flatten() for p in bucket if p.grad is not None]))
            for p, grad in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = grad.view_as(p)

    def wait(self) -> None:
        """Wait until every process has come to this call."""
        self.accelerator.wait_for_everyone()


BUCKET = 64 * 2**20
"""Size of a message of gradients, in bytes: large enough to be fast, small beside a model."""


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters in order, as many together as fit into a message. A larger parameter has its own."""
    bucket: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        if bucket and size + p.nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.nbytes
    if bucket:
        yield bucket
