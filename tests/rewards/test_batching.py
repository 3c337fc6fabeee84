from __future__ import annotations

import threading
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

    def to(self, device: torch.device | str) -> Gate:
        return self

    def __call__(self, samples: Any, prompts: Sequence[str], metadata: Any) -> Scores:
        self.calls.append(list(prompts))
        self.entered.release()
        assert self.opened.wait(10)
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
    made = Batcher(gate, max_batch=4, max_size=50, wait=0.0, most_waiting=8, most_size=100)
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


def test_a_call_of_several_jobs_holds_a_limited_number_of_bytes(gate: Gate, batcher: Batcher) -> None:
    """An image of 2 × 2 pixels has 12 bytes, one of 4 × 4 has 48, and a call holds at most 50."""
    jobs = [images(batcher, 4, 51), images(batcher, 4, 102)]
    gate.opened.set()
    assert [values(job) for job in jobs] == [[pytest.approx(0.2)], [pytest.approx(0.4)]]
    assert gate.calls[1:] == [["4"], ["4"]]


def test_a_limit_of_bytes_keeps_the_order(gate: Gate, batcher: Batcher) -> None:
    """The first job is in the next call, whatever its size."""
    sizes = {"a": 60, "b": 2, "c": 30, "d": 4, "e": 3}
    jobs = [batcher.submit(["1".zfill(size)], [name], [{}]) for name, size in sizes.items()]
    gate.opened.set()
    assert [values(job) for job in jobs] == [[1.0]] * 5
    assert gate.calls[1:] == [["a"], ["b", "c", "d", "e"]]


def test_jobs_that_do_not_fit_are_next(gate: Gate, batcher: Batcher) -> None:
    sizes = {"a": 30, "b": 25, "c": 20, "d": 20}
    jobs = [batcher.submit(["1".zfill(size)], [name], [{}]) for name, size in sizes.items()]
    gate.opened.set()
    assert [values(job) for job in jobs] == [[1.0]] * 4
    assert gate.calls[1:] == [["a", "c"], ["b", "d"]]


def test_bytes_that_wait_are_limited(gate: Gate, batcher: Batcher) -> None:
    jobs = [images(batcher, 4, 0), images(batcher, 4, 0)]
    with pytest.raises(Busy, match=r"2 rows \(0\.0 MB\) wait for reward 'gate' already; 1 more .* or 0\.0001 MB"):
        images(batcher, 2, 0)
    assert jobs[0].cancel()
    jobs.append(images(batcher, 2, 255))
    gate.opened.set()
    assert values(jobs[2]) == [1.0]


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
    with pytest.raises(Busy, match=r"8 rows .* wait for reward 'gate' already; 1 more .* would be above 8 rows"):
        texts(batcher, 9)
    gate.opened.set()
    assert len(values(job)) == 8
    assert values(texts(batcher, *range(9))) == list(range(9))  # one job is taken however large


def test_a_queue_may_be_filled_to_its_limits(gate: Gate, batcher: Batcher) -> None:
    """The limits are eight rows and a hundred characters."""
    rows = [texts(batcher, 1, 2, 3), texts(batcher, 4, 5, 6, 7, 8)]
    assert batcher.waiting == 8
    gate.opened.set()
    assert [len(values(job)) for job in rows] == [3, 5]
    gate.opened.clear()
    while gate.entered.acquire(blocking=False):
        pass
    first = texts(batcher, 0)
    assert gate.entered.acquire(timeout=10)
    sizes = [batcher.submit(["1".zfill(size)], [f"{size}"], [{}]) for size in (60, 40)]
    gate.opened.set()
    assert [values(job) for job in (first, *sizes)] == [[0], [1], [1]]


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


def test_bytes_may_end_the_wait_too(gate: Gate) -> None:
    gate.opened.set()
    made = Batcher(gate, max_size=6, wait=60.0)
    jobs = [made.submit(["001"], ["a"], [{}]), made.submit(["002"], ["b"], [{}])]
    assert [values(job) for job in jobs] == [[1], [2]]
    assert gate.calls == [["a", "b"]]
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
    for wrong in ({"max_batch": 0}, {"max_size": 0}, {"wait": -1.0}, {"most_waiting": 0}, {"most_size": 0}):
        with pytest.raises(ValueError, match="max_batch is"):
            Batcher(gate, **wrong)
