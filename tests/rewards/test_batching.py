from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import RewardError, Scores
from rewards.batching import Batcher, Busy


class Gate:
    """A reward that waits until it is opened.

    It returns the first pixel or the number in a text, and records the prompts of each call.
    """

    name = "gate"
    needs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.entered, self.opened = threading.Semaphore(0), threading.Event()
        self.shortage: Exception | None = None

    def to(self, device: torch.device | str) -> Gate:
        return self

    def __call__(self, samples: Any, prompts: Sequence[str], metadata: Any) -> Scores:
        self.calls.append(list(prompts))
        self.entered.release()
        assert self.opened.wait(10)
        if self.shortage is not None:
            raise self.shortage
        if "exit" in prompts:
            raise SystemExit(3)
        if "bad" in prompts:
            raise RewardError(self.name, "bad row", prompts.index("bad"), "bad")
        values = samples[:, 0, 0, 0] if isinstance(samples, Tensor) else torch.tensor([float(text) for text in samples])
        return Scores(values, torch.tensor([prompt != "invalid" for prompt in prompts]))


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def batcher(gate: Gate) -> Iterator[Batcher]:
    """A batcher that is busy with a first job, so that others wait until the gate opens."""
    made = Batcher(gate, max_batch=4, wait=0.0, most_waiting=8)
    made.submit(["0"], ["first"], [{}])
    assert gate.entered.acquire(timeout=10)
    yield made
    gate.opened.set()
    made.close()


def texts(batcher: Batcher, *numbers: int, prompt: str = "p") -> Future[Scores]:
    return batcher.submit([str(n) for n in numbers], [f"{prompt}{n}" for n in numbers], [{} for _ in numbers])


def images(batcher: Batcher, size: int, *pixels: int) -> Future[Scores]:
    made = torch.tensor(pixels, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, size, size)
    return batcher.submit(made, [f"{size}" for _ in pixels], [{} for _ in pixels])


def values(job: Future[Scores]) -> list[float]:
    return job.result(timeout=10).values.tolist()


def test_jobs_share_calls_up_to_the_limit_and_get_their_own_rows(gate: Gate, batcher: Batcher) -> None:
    jobs = [texts(batcher, 1, 2), texts(batcher, 3), texts(batcher, 4, 5), texts(batcher, 6)]
    gate.opened.set()
    assert [values(job) for job in jobs] == [[1, 2], [3], [4, 5], [6]]
    # 4 and 5 do not fit beside three rows, 6 does.
    assert gate.calls == [["first"], ["p1", "p2", "p3", "p6"], ["p4", "p5"]]
    assert batcher.answered == 7


def test_a_job_above_the_limit_is_one_call(gate: Gate, batcher: Batcher) -> None:
    jobs = [texts(batcher, 1), texts(batcher, *range(2, 8))]
    gate.opened.set()
    assert [values(job) for job in jobs] == [[1], [2, 3, 4, 5, 6, 7]]
    assert [len(call) for call in gate.calls] == [1, 1, 6]


def test_images_of_one_size_share_a_call(gate: Gate, batcher: Batcher) -> None:
    jobs = [images(batcher, 2, 0, 51), images(batcher, 3, 102), images(batcher, 2, 255), texts(batcher, 7)]
    gate.opened.set()
    assert [values(job) for job in jobs] == [pytest.approx([0, 0.2]), pytest.approx([0.4]), [1.0], [7.0]]
    assert gate.calls[1:] == [["2", "2", "2"], ["3"], ["p7"]]


def test_jobs_that_do_not_fit_are_next(gate: Gate, batcher: Batcher) -> None:
    """The first job is in the next call, whatever its size."""
    counts = {"a": 5, "b": 1, "c": 2, "d": 2, "e": 1}
    jobs = [batcher.submit(["1"] * count, [name] * count, [{}] * count) for name, count in list(counts.items())[:3]]
    gate.opened.set()
    assert [values(job) for job in jobs] == [[1.0] * counts[name] for name in "abc"]
    assert gate.calls[1:] == [["a"] * 5, ["b", "c", "c"]]


def test_a_failure_keeps_nothing_of_its_images(gate: Gate, batcher: Batcher) -> None:
    """Its traceback would keep the images until the garbage collector runs."""
    job = batcher.submit(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), ["bad"], [{}])
    gate.opened.set()
    error = job.exception(timeout=10)
    assert isinstance(error, RewardError)
    assert (error.__cause__, error.__context__, error.__traceback__) == (None, None, None)


def test_an_answer_keeps_nothing_of_its_images(gate: Gate, batcher: Batcher) -> None:
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    kept, job = weakref.ref(images), batcher.submit(images, ["2"], [{}])
    del images
    gate.opened.set()
    assert values(job) == [0]
    batcher.close()
    assert kept() is None


@pytest.mark.parametrize(
    "shortage", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")]
)
def test_a_shortage_of_memory_is_busy_and_no_failure(gate: Gate, batcher: Batcher, shortage: Exception) -> None:
    gate.shortage = shortage
    job = texts(batcher, 1)
    gate.opened.set()
    with pytest.raises(Busy, match="reward 'gate' has not enough memory for 1 rows now"):
        job.result(timeout=10)


def test_only_the_job_that_fails_fails(gate: Gate, batcher: Batcher) -> None:
    jobs = [texts(batcher, 1), batcher.submit(["2", "3"], ["fine", "bad"], [{}, {}]), texts(batcher, 4)]
    gate.opened.set()
    assert (values(jobs[0]), values(jobs[2])) == ([1], [4])
    with pytest.raises(RewardError, match="bad row") as caught:
        jobs[1].result(timeout=10)
    assert caught.value.row == 1  # in its own job, not in the call that was shared
    assert gate.calls[1:] == [["p1", "fine", "bad", "p4"], ["p1"], ["fine", "bad"], ["p4"]]


def test_the_thread_survives_a_reward_that_exits(gate: Gate, batcher: Batcher) -> None:
    job = batcher.submit(["1"], ["exit"], [{}])
    gate.opened.set()
    with pytest.raises(RewardError, match="SystemExit"):
        job.result(timeout=10)
    assert values(texts(batcher, 2)) == [2]
    assert batcher.alive


def test_invalid_rows_stay_invalid(gate: Gate, batcher: Batcher) -> None:
    job = batcher.submit(["1", "2"], ["fine", "invalid"], [{}, {}])
    gate.opened.set()
    assert job.result(timeout=10).valid.tolist() == [True, False]


def test_a_cancelled_job_is_not_scored(gate: Gate, batcher: Batcher) -> None:
    gone, other = texts(batcher, 1), texts(batcher, 2)
    assert gone.cancel()
    assert batcher.waiting == 1
    gate.opened.set()
    assert values(other) == [2]
    assert gate.calls == [["first"], ["p2"]]


def test_a_full_queue_is_busy(gate: Gate, batcher: Batcher) -> None:
    job = texts(batcher, *range(8))
    assert batcher.waiting == 8
    with pytest.raises(Busy, match=r"8 rows wait for reward 'gate' already; 1 more would be above 8"):
        texts(batcher, 9)
    gate.opened.set()
    assert len(values(job)) == 8
    assert values(texts(batcher, *range(9))) == list(range(9))  # one job is taken however large


def test_a_queue_may_be_filled_to_its_limits(gate: Gate, batcher: Batcher) -> None:
    """The limit is eight rows."""
    rows = [texts(batcher, 1, 2, 3), texts(batcher, 4, 5, 6, 7, 8)]
    assert batcher.waiting == 8
    gate.opened.set()
    assert [len(values(job)) for job in rows] == [3, 5]


def test_closing_scores_waiting_jobs_and_accepts_no_more(gate: Gate, batcher: Batcher) -> None:
    job = texts(batcher, 1)
    gate.opened.set()
    batcher.close()
    assert values(job) == [1]
    assert not batcher.alive
    with pytest.raises(Busy, match="is being shut down"):
        texts(batcher, 2)


def test_the_first_job_waits_for_others(gate: Gate) -> None:
    """A full batch ends the wait, which would otherwise last longer than the test's limit."""
    gate.opened.set()
    made = Batcher(gate, max_batch=2, wait=60.0)
    jobs = [texts(made, 1), texts(made, 2)]
    assert [values(job) for job in jobs] == [[1], [2]]
    assert gate.calls == [["p1", "p2"]]
    made.close()


def test_jobs_of_another_kind_do_not_end_the_wait(gate: Gate) -> None:
    gate.opened.set()
    made = Batcher(gate, max_batch=2, wait=60.0)
    first, other = texts(made, 1), images(made, 2, 255)
    with pytest.raises(TimeoutError):
        first.result(timeout=0.2)
    second = texts(made, 2)
    assert [values(job) for job in (first, second)] == [[1], [2]]
    assert gate.calls == [["p1", "p2"]]
    made.close()
    assert values(other) == [1.0]


def test_limits_out_of_range(gate: Gate) -> None:
    for wrong in ({"max_batch": 0}, {"wait": -1.0}, {"most_waiting": 0}):
        with pytest.raises(ValueError, match="max_batch is"):
            Batcher(gate, **wrong)
