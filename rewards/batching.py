"""Requests that arrive together are scored together, and each gets its own answer back.

One thread a reward: rewards need not be safe for several, and a device is used best by one call at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewards.base import Metadata, Reward, RewardError, Samples, Scores, score

log = logging.getLogger(__name__)


class Busy(RuntimeError):
    """Too much is waiting already, or nothing more is taken."""


@dataclass(eq=False)
class Job:
    """The rows of one request: images [B,3,H,W] of 8 bits, or texts."""

    samples: Samples
    prompts: Sequence[str]
    metadata: Metadata
    arrived: float = field(default_factory=time.monotonic)
    answer: Future[Scores] = field(default_factory=Future)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def size(self) -> int:
        """Bytes of the images, three a pixel, or characters of the texts."""
        return self.samples.nbytes if isinstance(self.samples, Tensor) else sum(map(len, self.samples))

    @property
    def kind(self) -> tuple[int, ...] | None:
        """What jobs of one call share: the size of their images."""
        return tuple(self.samples.shape[1:]) if isinstance(self.samples, Tensor) else None


class Batcher:
    """A thread that scores jobs with one reward.

    A call takes the first job and those of its kind that fit into `max_batch` rows and `max_size` bytes; the first waits at
    most `wait` seconds for others, and not at all if it waited so long behind another call. A job is never divided: one
    above a limit has a call of its own, within which the reward makes its batches. If a call of several jobs fails, each is
    scored by itself, so that the failure reaches only the job that causes it.

    At most `most_waiting` rows and `most_size` bytes wait, or one job however large. Bytes are those of `Job.size`; in a
    call an image takes four times as many, as floats.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        max_batch: int = 64,
        max_size: int = 192_000_000,
        wait: float = 0.005,
        most_waiting: int = 1024,
        most_size: int = 1_000_000_000,
    ) -> None:
        if min(max_batch, max_size, most_waiting, most_size) < 1 or wait < 0:
            raise ValueError(
                f"max_batch is {max_batch}, max_size {max_size}, wait {wait}, most_waiting {most_waiting} and "
                f"most_size {most_size}; expected above 0, wait may be 0"
            )
        self.reward, self.max_batch, self.max_size, self.wait = reward, max_batch, max_size, wait
        self.most_waiting, self.most_size = most_waiting, most_size
        self.answered = 0  # rows that have been scored
        self._jobs: deque[Job] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"reward {reward.name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that no call has taken yet."""
        with self._changed:
            return sum(map(len, self._jobs))

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive() and not self._closed

    def submit(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Future[Scores]:
        """Put rows into the queue; `Busy` where it is full."""
        job = Job(samples, prompts, metadata)
        with self._changed:
            rows, size = _total(self._jobs)
            if self._closed:
                raise Busy(f"reward '{self.reward.name}' is being shut down")
            if self._jobs and (rows + len(job) > self.most_waiting or size + job.size > self.most_size):
                raise Busy(
                    f"{rows} rows ({size / 1e6:.1f} MB) wait for reward '{self.reward.name}' already; {len(job)} more "
                    f"({job.size / 1e6:.1f} MB) would be above {self.most_waiting} rows or {self.most_size / 1e6:g} MB"
                )
            self._jobs.append(job)
            self._changed.notify_all()
        job.answer.add_done_callback(lambda answer: self._forget(job) if answer.cancelled() else None)
        return job.answer

    def close(self, seconds: float = 5.0) -> None:
        """Take no more jobs, and wait this long for those that are there."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)

    def _work(self) -> None:
        while batch := self._next():
            running = [job for job in batch if job.answer.set_running_or_notify_cancel()]
            if running:
                self._answer(running)

    def _next(self) -> list[Job]:
        """The jobs of the next call; none when all is done and the batcher is closed."""
        with self._changed:
            while not self._closed and (left := self._left()) != 0:
                self._changed.wait(left)
            return self._take()

    def _left(self) -> float | None:
        """Seconds until the first job waits no longer, which may be cancelled meanwhile; None where there is none."""
        if not self._jobs:
            return None
        rows, size = _total(job for job in self._jobs if job.kind == self._jobs[0].kind)
        full = rows >= self.max_batch or size >= self.max_size
        return 0.0 if full else max(0.0, self._jobs[0].arrived + self.wait - time.monotonic())

    def _take(self) -> list[Job]:
        batch, others = list[Job](), deque[Job]()
        rows = size = 0
        for job in self._jobs:
            fits = rows + len(job) <= self.max_batch and size + job.size <= self.max_size
            if not batch or (job.kind == batch[0].kind and fits):
                batch.append(job)
                rows, size = rows + len(job), size + job.size
            else:
                others.append(job)
        self._jobs = others
        return batch

    def _forget(self, gone: Job) -> None:
        """A cancelled job waits no more, nor do its samples take memory."""
        with self._changed:
            self._jobs = deque(job for job in self._jobs if job is not gone)
            self._changed.notify_all()

    def _answer(self, batch: Sequence[Job]) -> None:
        try:
            scores = self._score(batch)
        except BaseException as error:  # also SystemExit, which would end the thread and leave all others waiting
            if len(batch) > 1:
                for job in batch:
                    self._answer([job])
                return
            log.warning("%s", error)
            failure = error if isinstance(error, RewardError) else RewardError(self.reward.name, repr(error))
            batch[0].answer.set_exception(failure)
            return
        sizes = [len(job) for job in batch]
        self.answered += sum(sizes)
        for job, values, valid in zip(batch, scores.values.split(sizes), scores.valid.split(sizes), strict=True):
            job.answer.set_result(Scores(values, valid))

    def _score(self, batch: Sequence[Job]) -> Scores:
        prompts = [prompt for job in batch for prompt in job.prompts]
        metadata = [row for job in batch for row in job.metadata]
        scores = score(self.reward, _joined([job.samples for job in batch]), prompts, metadata)
        return Scores(scores.values.cpu(), scores.valid.cpu())


def _total(jobs: Iterable[Job]) -> tuple[int, int]:
    """Rows and bytes."""
    counted = [(len(job), job.size) for job in jobs]
    return sum(rows for rows, _ in counted), sum(size for _, size in counted)


def _joined(samples: Sequence[Samples]) -> Samples:
    """Images in [0,1], or texts, of several jobs."""
    images = [one for one in samples if isinstance(one, Tensor)]
    return torch.cat(images).float().div_(255) if images else [text for texts in samples for text in texts]
