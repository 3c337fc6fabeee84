"""Dynamic batching: requests that arrive together are scored in one call, and each gets its own scores.

There is one thread a reward: rewards need not be thread-safe, and a device is used best by one call at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewards.base import Metadata, Reward, RewardError, Samples, Scores, score
from rewards.memory import is_out_of_memory
from rewards.protocol import printable

log = logging.getLogger(__name__)


class Busy(RuntimeError):
    """The queue is full, memory is short, or the batcher is closed."""


@dataclass(eq=False)
class Job:
    """The rows of one request: 8-bit images [B,3,H,W] or videos [B,F,3,H,W], or texts."""

    samples: Samples
    prompts: Sequence[str]
    metadata: Metadata
    arrived: float = field(default_factory=time.monotonic)
    answer: Future[Scores] = field(default_factory=Future)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """The shape of an image or video, None for texts. Only jobs of one shape are scored in one call."""
        return tuple(self.samples.shape[1:]) if isinstance(self.samples, Tensor) else None


class Batcher:
    """A thread that scores jobs with one reward.

    A call takes the first job, and the jobs of its shape that fit into `max_batch` rows. The first job waits at most `wait`
    seconds for others; time spent behind another call counts. A job is never split: one above the limit gets its own call,
    and the reward splits it into batches. If a call of several jobs fails, each job is scored alone, so that only the job
    that causes the failure fails.

    At most `most_waiting` rows may wait, or one job of any size. Memory is not bounded here: see `MemoryBudget`.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        max_batch: int = 64,
        wait: float = 0.005,
        most_waiting: int = 1024,
    ) -> None:
        if min(max_batch, most_waiting) < 1 or wait < 0:
            raise ValueError(
                f"max_batch is {max_batch}, wait {wait} and most_waiting {most_waiting}; expected above 0, wait may be 0"
            )
        self.reward, self.max_batch, self.wait, self.most_waiting = reward, max_batch, wait, most_waiting
        self.answered = 0  # rows scored so far
        self._jobs: deque[Job] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"reward {reward.name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of rows in the queue."""
        with self._changed:
            return sum(map(len, self._jobs))

    @property
    def alive(self) -> bool:
        """Whether the batcher accepts jobs."""
        return self._thread.is_alive() and not self._closed

    def submit(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Future[Scores]:
        """Queue rows, and return their future scores. Raise `Busy` if the queue is full or closed."""
        job = Job(samples, prompts, metadata)
        with self._changed:
            rows = sum(map(len, self._jobs))
            if self._closed:
                raise Busy(f"reward '{self.reward.name}' is being shut down")
            if self._jobs and rows + len(job) > self.most_waiting:
                raise Busy(
                    f"{rows} rows wait for reward '{self.reward.name}' already; {len(job)} more would be above "
                    f"{self.most_waiting}"
                )
            self._jobs.append(job)
            self._changed.notify_all()
        job.answer.add_done_callback(self._remove_cancelled)
        return job.answer

    def close(self, seconds: float = 5.0) -> None:
        """Accept no more jobs, and wait at most `seconds` for those in the queue."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)

    def _work(self) -> None:
        while self._answer_next():
            pass

    def _answer_next(self) -> bool:
        """Score the jobs of the next call; False if there are no more. No job outlives its answer in this thread."""
        batch = self._next_batch()
        running = [job for job in batch if job.answer.set_running_or_notify_cancel()]
        if running:
            self._answer(running)
        return bool(batch)

    def _next_batch(self) -> list[Job]:
        """Wait for the jobs of the next call, and return them; none if the batcher is closed and its queue empty."""
        with self._changed:
            while not self._closed and (left := self._seconds_left()) != 0:
                self._changed.wait(left)
            return self._pop_batch()

    def _seconds_left(self) -> float | None:
        """Return how long the first job still waits for others; None if the queue is empty."""
        if not self._jobs:
            return None
        rows = sum(len(job) for job in self._jobs if job.image_shape == self._jobs[0].image_shape)
        return 0.0 if rows >= self.max_batch else max(0.0, self._jobs[0].arrived + self.wait - time.monotonic())

    def _pop_batch(self) -> list[Job]:
        batch, others = list[Job](), deque[Job]()
        rows = 0
        for job in self._jobs:
            if not batch or (job.image_shape == batch[0].image_shape and rows + len(job) <= self.max_batch):
                batch.append(job)
                rows += len(job)
            else:
                others.append(job)
        self._jobs = others
        return batch

    def _remove_cancelled(self, answer: Future[Scores]) -> None:
        """Remove a cancelled job from the queue, which frees the memory of its samples."""
        if answer.cancelled():
            with self._changed:
                self._jobs = deque(job for job in self._jobs if job.answer is not answer)
                self._changed.notify_all()

    def _answer(self, batch: Sequence[Job]) -> None:
        try:
            scores = self._score(batch)
        except BaseException as error:  # SystemExit too: it would end the thread, and other jobs would wait forever
            if len(batch) > 1:
                for job in batch:
                    self._answer([job])
                return
            log.warning("%s", printable(str(error)))
            failure: Exception = error if isinstance(error, RewardError) else RewardError(self.reward.name, repr(error))
            if is_out_of_memory(error):
                failure = Busy(f"reward '{self.reward.name}' has not enough memory for {len(batch[0])} rows now")
            # The traceback would keep the images alive until the garbage collector finds it.
            failure.__cause__ = failure.__context__ = failure.__traceback__ = None
            batch[0].answer.set_exception(failure)
            return
        sizes = [len(job) for job in batch]
        self.answered += sum(sizes)
        for job, values, valid in zip(batch, scores.values.split(sizes), scores.valid.split(sizes), strict=True):
            job.answer.set_result(Scores(values, valid))

    def _score(self, batch: Sequence[Job]) -> Scores:
        prompts = [prompt for job in batch for prompt in job.prompts]
        metadata = [row for job in batch for row in job.metadata]
        return score(self.reward, _concatenate([job.samples for job in batch]), prompts, metadata).to("cpu")


def _concatenate(samples: Sequence[Samples]) -> Samples:
    """Return the images of several jobs, in [0,1], or their texts."""
    images = [part for part in samples if isinstance(part, Tensor)]
    return torch.cat(images).float().div_(255) if images else [text for texts in samples for text in texts]
