"""What happens when a reward breaks or hangs: the run stops, the call is repeated, or the samples go without a reward.

Never is a sample scored 0 because something broke. What stops the run says so with the reward's name; what is dropped is an
invalid row, outside its group's baseline, and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rewards.base import Metadata, Reward, RewardError, Samples, Scores, score

OnError = Literal["raise", "retry", "drop"]
HOPELESS = 16
"""Calls in a row that fail, after which what is left is not tried."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failsafe:
    """A reward with a rule for its failures; an answer that `rewards.score` refuses is one too, so is a NaN.

    raise: the error, as it is. retry: the call is repeated, `retries` times at most, after `pause`, 2 `pause`, 4 `pause` …
    seconds; then the error. drop: the rows to blame are found by halving the batch and marked invalid; after a time limit all
    rows of the call are.

    With a `timeout` in seconds each call runs in a thread of its own. Python cannot end a thread: a call that is late is left
    to itself, and what it returns is thrown away.
    """

    reward: Reward
    on_error: OnError = "raise"
    timeout: float | None = None
    retries: int = 3
    pause: float = 1.0
    sleep: Callable[[float], None] = time.sleep

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

        return call() if self.timeout is None else within(self.timeout, call, self.name)

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
        """The whole, its halves that failed, theirs …, until single rows fail or nothing works any more."""
        values, valid = torch.zeros(len(samples)), torch.zeros(len(samples), dtype=torch.bool)
        parts, vain, last = deque([range(len(samples))]), 0, None
        while parts and vain < HOPELESS:
            rows = parts.popleft()
            part = slice(rows.start, rows.stop)
            try:
                found = self._once(samples[part], prompts[part], metadata[part])
            except RewardError as error:
                vain, last = vain + 1, error
                if len(rows) > 1 and not isinstance(error, Late):
                    parts.extend(_halves(rows))
            else:
                vain = 0
                values[part], valid[part] = found.values.cpu(), found.valid.cpu()
        if last is not None:
            log.warning("reward '%s' scored %d of %d samples: %s", self.name, int(valid.sum()), len(valid), last)
        device = samples.device if isinstance(samples, Tensor) else "cpu"
        return Scores(values.to(device), valid.to(device))


class Late(RewardError):
    """A reward took too long."""


def within(seconds: float, call: Callable[[], Scores], name: str) -> Scores:
    """What the call returns, from a thread that is given up after this time."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # whatever it is belongs to the thread that asked
            answers.put((None, error))

    threading.Thread(target=run, name=f"reward {name}", daemon=True).start()
    try:
        scores, error = answers.get(timeout=seconds)
    except queue.Empty:
        problem = f"no answer after {seconds:g} s; raise its timeout, or mend what hangs"
        raise Late(name, problem) from None
    if error is not None:
        raise error
    return scores


def _halves(rows: range) -> tuple[range, range]:
    middle = (rows.start + rows.stop) // 2
    return range(rows.start, middle), range(middle, rows.stop)
