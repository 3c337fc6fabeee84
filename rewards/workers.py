"""Calls of functions on texts in a process that can be killed: a text must not hold the program that judges it.

A text can keep sympy or a regular expression busy for hours, in code that no thread and no signal handler of Python can
interrupt. So such a function is called in a worker (`rewards.worker_process`), which ends with the call that is too late;
the other calls keep their answers. Workers are started when they are first needed, as many as there are calls of
`call_each` at the same time. A worker is a new interpreter without torch: it inherits no file descriptor, no thread and no
CUDA context, runs no code of `__main__`, and gets no signal of the terminal. It dies with this process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from rewards.worker_process import DIED, STALLED

DEADLINE: ContextVar[float] = ContextVar("DEADLINE", default=math.inf)
"""The time (of `time.monotonic`) by which calls must be answered, as set by the `timeout` of the reward that makes them."""
GRACE = 60.0
"""Seconds in which a worker starts, and by which it may miss the limit of a call before it is killed."""
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rewards.worker_process import main; main(sys.argv[2])"
log = logging.getLogger(__name__)


def call_each(target: str, calls: Sequence[tuple[Any, ...]], seconds: float, name: str) -> list[Any]:
    """Return the answers of a function to each call; None for a call that is late, or that needs too much memory.

    target: the function as `module:name`. calls: its arguments, which like its answers are values of JSON. Equal calls are
    made once. seconds: limit for one call, in seconds of computing. name: the reward that is named in warnings.
    """
    distinct = list(dict.fromkeys(calls))
    answers = dict(zip(distinct, _ask(target, distinct, seconds), strict=True))
    problems = [str(answer) for answer in map(answers.get, calls) if isinstance(answer, _Problem)]
    if problems:
        log.warning("reward '%s': %d of %d texts are invalid: %s", name, len(problems), len(calls), problems[0])
    return [None if isinstance(answer, _Problem) else answer for answer in map(answers.get, calls)]


def start(target: str) -> None:
    """Start a worker for this function, if none is idle, so that the first call does not wait. RuntimeError if it cannot."""
    _idle[target].append(_take(target))


class _Problem(str):
    """The reason why a call has no answer."""


_idle: defaultdict[str, list[_Worker]] = defaultdict(list)


def _ask(target: str, calls: list[tuple[Any, ...]], seconds: float) -> list[Any]:
    """Return an answer or a problem for each call. A worker that dies is replaced."""
    answers: list[Any] = []
    while len(answers) < len(calls):
        worker = _take(target)
        try:
            for answer in worker.answer(calls[len(answers) :], seconds, DEADLINE.get()):
                answers.append(answer)
        except OSError as error:
            worker.kill()
            answers.append(_Problem(f"the process that judges it ended: {error}"))
        except BaseException:
            worker.kill()
            raise
        else:
            _idle[target].append(worker)
    return answers


def _take(target: str) -> _Worker:
    """Return an idle worker, or a new one."""
    while True:
        try:
            worker = _idle[target].pop()
        except IndexError:
            return _Worker(target)
        if worker.process.poll() is None:
            return worker
        worker.kill()


class _Worker:
    """A process that answers calls of one function."""

    def __init__(self, target: str) -> None:
        self.channel, other = socket.socketpair()
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), target],
                stdin=subprocess.PIPE,
                stdout=other.fileno(),
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                # The order of sets, and with it sympy's, is the same in every process.
                env={**os.environ, "PYTHONHASHSEED": "0"},
            )
        self.channel.settimeout(GRACE)
        self.lines = self.channel.makefile("rb")
        try:
            problem = json.loads(self.lines.readline() or '["it ended at once"]')[0]
        except OSError as error:
            problem = str(error)
        if problem is not None:
            self.kill()
            raise RuntimeError(f"the process that judges texts ({target}) did not start: {problem}")

    def answer(self, calls: list[tuple[Any, ...]], seconds: float, until: float) -> Iterator[Any]:
        """Yield answers and problems, up to a call that takes too long. OSError if the whole worker died."""
        self.channel.settimeout(GRACE + STALLED * seconds)
        self.channel.sendall(json.dumps({"calls": calls, "seconds": seconds, "until": until}).encode() + b"\n")
        for _ in calls:
            line = self.lines.readline()
            if line == DIED:
                yield _Problem(f"judging it took over {seconds:g} s, or all of the time that was left")
                return
            if not line:
                raise ConnectionError("without an answer")
            answer, *problem = json.loads(line)
            yield _Problem(problem[0]) if problem else answer

    def close(self) -> None:
        """End the idle process, and wait for it."""
        self.lines.close()
        self.channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        self.kill()

    def kill(self) -> None:
        """End the process, whatever it does, and wait for it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.lines.close()
        self.channel.close()


@atexit.register
def _close_all() -> None:
    for workers in _idle.values():
        while workers:
            workers.pop().close()


os.register_at_fork(after_in_child=_idle.clear)  # they answer the process that started them
