"""What happens when a reward breaks or hangs: the run stops, the call is repeated, or the samples go without a reward.

Never is a sample scored 0 because something broke. What stops the run says so with the reward's name; what is dropped is an
invalid row, outside its group's baseline, and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rewards.base import Metadata, Reward, RewardError, Samples, Scores, score

OnError = Literal["raise", "retry", "drop"]
PROBES = 16
"""Single samples, spread over a batch that failed, of which one must be scored for the rest to be tried."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failsafe:
    """A reward with a rule for its failures; an answer that `rewards.score` refuses is one too, so is a NaN.

    raise: the error, as it is. retry: the call is repeated, `retries` times at most, after `pause`, 2 `pause`, 4 `pause` …
    seconds; then the error. drop: the rows to blame are found by halving the batch, all of them, and marked invalid; where no
    sample of sixteen can be scored alone, all are. A time limit that passes ends the search: what is not scored by then is
    invalid.

    With a `timeout` in seconds each call runs in a thread of its own, and the first loads the reward's model. Python cannot
    end a thread: a call that is late is left to itself, what it returns is thrown away, and the next waits for it to end, at
    most as long again, since no reward is called twice at a time.
    """

    reward: Reward
    on_error: OnError = "raise"
    timeout: float | None = None
    retries: int = 3
    pause: float = 1.0
    sleep: Callable[[float], None] = time.sleep
    _busy: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The reward's."""
        return self.reward.name

    @property
    def needs(self) -> tuple[str, ...]:
        """The reward's."""
        return self.reward.needs

    def to(self, device: torch.device | str) -> Failsafe:
        """Move the reward."""
        self.reward.to(device)
        return self

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """The reward's checked scores."""
        if self.on_error == "retry":
            return self._repeated(samples, prompts, metadata)
        if self.on_error == "drop":
            return self._halved(samples, prompts, metadata)
        return self._once(samples, prompts, metadata)

    def _once(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        def call() -> Scores:
            return score(self.reward, samples, prompts, metadata)

        return call() if self.timeout is None else within(self.timeout, call, self.name, self._busy)

    def _repeated(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        for attempt in range(self.retries):
            try:
                return self._once(samples, prompts, metadata)
            except RewardError as error:
                pause = self.pause * 2**attempt
                log.warning("%s; once more in %g s (%d of %d)", error, pause, attempt + 1, self.retries)
                self.sleep(pause)
        return self._once(samples, prompts, metadata)

    def _halved(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Depth first, so that whole rows are scored in few calls and none that can be is left out."""
        whole = range(len(samples))
        values, valid = torch.zeros(len(whole)), torch.zeros(len(whole), dtype=torch.bool)

        def failure(rows: range) -> RewardError | None:
            """Scores these rows; the error where they cannot be."""
            part = slice(rows.start, rows.stop)
            try:
                found = self._once(samples[part], prompts[part], metadata[part])
            except Late:
                raise
            except RewardError as error:
                return error
            values[part], valid[part] = found.values.cpu(), found.valid.cpu()
            return None

        try:
            problem = failure(whole)
            if problem is not None and any(failure(row) is None for row in _probes(len(whole))):
                parts = [whole]
                while parts:
                    parts += [rows for rows in _halves(parts.pop()) if failure(rows) is not None and len(rows) > 1]
        except Late as error:  # every further call may be as late
            problem = error
        if problem is not None:
            log.warning("reward '%s' scored %d of %d samples: %s", self.name, int(valid.sum()), len(valid), problem)
        device = samples.device if isinstance(samples, Tensor) else "cpu"
        return Scores(values.to(device), valid.to(device))


class Late(RewardError):
    """A reward took too long."""


def within(seconds: float, call: Callable[[], Scores], name: str, busy: threading.Lock) -> Scores:
    """What the call returns, from a thread that is given up after this time; `busy` is held for as long as it runs."""
    if not busy.acquire(timeout=seconds):
        raise Late(name, f"an earlier call, that was late, has not ended after {seconds:g} s more; mend what hangs")
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # whatever it is belongs to the thread that asked
            answers.put((None, error))
        finally:
            busy.release()

    threading.Thread(target=run, name=f"reward {name}", daemon=True).start()
    try:
        scores, error = answers.get(timeout=seconds)
    except queue.Empty:
        problem = f"no answer after {seconds:g} s; raise its timeout, or mend what hangs"
        raise Late(name, problem) from None
    if error is not None:
        raise error
    return scores


def _probes(count: int) -> list[range]:
    """Single rows in an order of no pattern; of one row alone everything is known."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:PROBES]
    return [range(row, row + 1) for row in order.tolist()] if count > 1 else []


def _halves(rows: range) -> tuple[range, range]:
    middle = (rows.start + rows.stop) // 2
    return range(rows.start, middle), range(middle, rows.stop)
