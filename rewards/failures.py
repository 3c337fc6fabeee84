"""Rules for rewards that fail or hang: the run stops, the call is repeated, or the samples are dropped.

A sample is never scored 0 because of a failure. An error that stops the run has the reward's name. A dropped sample is an
invalid row: it is outside its group's baseline, and it is counted.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rewards.base import Metadata, Reward, RewardError, Samples, Scores, preload, score
from rewards.random_state import FirstCall, preserved_random_state
from rewards.workers import DEADLINE

OnError = Literal["raise", "retry", "drop"]
PROBES = 16
"""Number of single samples of a failed batch that are tried. The rest is only tried if one of them can be scored."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failsafe:
    """A reward with a rule for its failures. A result that `rewards.score` rejects, such as a NaN, is a failure too.

    raise: raise the error. retry: repeat the call after `pause`, 2 `pause`, 4 `pause` … seconds, at most `retries` times,
    then raise the error. drop: find all rows that cause the failure by halving the batch, and mark them invalid. If none of
    sixteen samples can be scored alone, the whole batch is invalid. A call that exceeds the time limit ends the search, and
    rows not scored by then are invalid.

    The first call may build a model. If it draws from the global random generators, it is made twice (`FirstCall`).

    With a `timeout` in seconds each call runs in its own thread; the first call includes loading the model. Python cannot
    end a thread. A call that is too late continues in its thread, its result is discarded, and the next call first waits
    for it to end, at most `timeout` seconds, because no reward is called twice at the same time.
    """

    reward: Reward
    on_error: OnError = "raise"
    timeout: float | None = None
    retries: int = 3
    pause: float = 1.0
    sleep: Callable[[float], None] = time.sleep
    _busy: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)
    _first: FirstCall = field(default_factory=FirstCall, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Name of the reward."""
        return self.reward.name

    @property
    def needs(self) -> tuple[str, ...]:
        """Inputs of the reward."""
        return self.reward.needs

    def to(self, device: torch.device | str) -> Failsafe:
        """Move the reward, and return this object."""
        self.reward.to(device)
        return self

    def preload(self) -> None:
        """Load the reward's model now, if it has one. No rule applies: without its model a reward scores nothing."""
        with preserved_random_state():
            preload(self.reward)

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Return the reward's checked scores."""
        return self._first(partial(self._call_by_rule, samples, prompts, metadata))

    def _call_by_rule(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        if self.on_error == "retry":
            return self._call_with_retries(samples, prompts, metadata)
        if self.on_error == "drop":
            return self._call_by_halves(samples, prompts, metadata)
        return self._call(samples, prompts, metadata)

    def _call(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        call = partial(score, self.reward, samples, prompts, metadata)
        return call() if self.timeout is None else call_with_timeout(call, self.timeout, self.name, self._busy)

    def _call_with_retries(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        for attempt in range(self.retries):
            try:
                return self._call(samples, prompts, metadata)
            except RewardError as error:
                pause = self.pause * 2**attempt
                log.warning("%s; once more in %g s (%d of %d)", error, pause, attempt + 1, self.retries)
                self.sleep(pause)
        return self._call(samples, prompts, metadata)

    def _call_by_halves(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score all rows that can be scored. The search is depth-first, and large parts are scored in one call."""
        whole = range(len(samples))
        values, valid = torch.zeros(len(whole)), torch.zeros(len(whole), dtype=torch.bool)

        def try_rows(rows: range) -> RewardError | None:
            """Score these rows, or return the error."""
            part = slice(rows.start, rows.stop)
            try:
                scores = self._call(samples[part], prompts[part], metadata[part])
            except Late:
                raise
            except RewardError as error:
                return error
            values[part], valid[part] = scores.to("cpu")
            return None

        try:
            problem = try_rows(whole)
            if problem is not None and any(try_rows(row) is None for row in _probes(len(whole))):
                failed = [whole]
                while failed:
                    failed += [half for half in _halves(failed.pop()) if try_rows(half) is not None and len(half) > 1]
        except Late as error:  # every further call may be as late
            problem = error
        if problem is not None:
            log.warning("reward '%s' scored %d of %d samples: %s", self.name, int(valid.sum()), len(valid), problem)
        return Scores(values, valid).to(samples.device if isinstance(samples, Tensor) else "cpu")


class Late(RewardError):
    """A reward exceeded its time limit."""


def call_with_timeout(call: Callable[[], Scores], seconds: float, name: str, busy: threading.Lock) -> Scores:
    """Run ``call`` in a thread and return its result. Raise Late after `seconds`; the thread then continues alone.

    ``busy`` is held for as long as the call runs. Raise Late too if an earlier call holds it for `seconds`.
    """
    if not busy.acquire(timeout=seconds):
        raise Late(
            name,
            f"an earlier call that was too late is still running after {seconds:g} s more; fix the code that hangs",
        )
    results: queue.SimpleQueue[Scores | BaseException] = queue.SimpleQueue()

    def run() -> None:
        DEADLINE.set(time.monotonic() + 0.9 * seconds)  # rewards that judge in workers then return what they have
        try:
            results.put(call())
        except BaseException as error:  # of any kind: it is raised in the calling thread
            results.put(error)
        finally:
            busy.release()

    threading.Thread(target=run, name=f"reward {name}", daemon=True).start()
    try:
        result = results.get(timeout=seconds)
    except queue.Empty:
        raise Late(name, f"no answer after {seconds:g} s; raise its timeout, or fix the code that hangs") from None
    if isinstance(result, BaseException):
        raise result
    return result


def _probes(count: int) -> list[range]:
    """Return single rows in random order; none of a batch of one, which has been tried already."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:PROBES]
    return [range(row, row + 1) for row in order.tolist()] if count > 1 else []


def _halves(rows: range) -> tuple[range, range]:
    middle = (rows.start + rows.stop) // 2
    return range(rows.start, middle), range(middle, rows.stop)
