"""The process in which `rewards.workers` calls a function: a forker, and its child, which makes the calls.

The kernel ends a call that takes too long: the child's timers have the default action of their signals, which needs no
bytecode to run, so it ends powers of huge integers and regular expressions as well. The forker has imported all that the
function needs. It reports the death, and forks the next child in milliseconds.

Both processes die with the process that started them, even if that was killed: it alone holds the other end of their
stdin, a pipe on which nothing is ever written, and the kernel sends them SIGIO when that end is closed.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

MEMORY = 2**32
"""Bytes of address space of the child, at most. A call that needs more raises MemoryError."""
STALLED = 20
"""Limit of a call in seconds of the clock, in units of its limit in seconds of computing."""
DIED = b"\n"
"""Line in the place of an answer [value] or an error [null, message]: the child is dead, and with it the calls behind."""


def main(target: str) -> None:
    """Serve the function at `module:name` on the socket that is stdout, until that is closed."""
    channel = socket.socket(fileno=os.dup(1))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGIO, signal.SIGALRM, signal.SIGPROF, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(0, fcntl.F_SETFL, os.O_ASYNC)
    module, _, name = target.partition(":")
    try:
        function = getattr(import_module(module), name)
    except BaseException as error:
        channel.sendall(_encode(f"{type(error).__name__}: {error}"))
        raise
    channel.sendall(_encode(None))
    calling = mmap.mmap(-1, 1)  # shared with the child: 1 during a call
    while True:
        child = os.fork()
        if child == 0:
            _limit_memory()
            _serve(function, channel, calling)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        if calling[0]:
            calling[0] = 0
            channel.sendall(DIED)


def _serve(function: Callable[..., object], channel: socket.socket, calling: mmap.mmap) -> None:
    """Answer each request, which is a line, with a line for each of its calls."""
    for line in channel.makefile("rb"):
        request = json.loads(line)
        for arguments in request["calls"]:
            calling[0] = 1
            answer = _call(function, arguments, request["seconds"], request["until"])
            calling[0] = 0
            channel.sendall(answer)


def _call(function: Callable[..., object], arguments: list[Any], seconds: float, until: float) -> bytes:
    """Return the answer to a call. A call may use `seconds`, and half of the time that is left.

    So calls that never end leave time for those behind them.
    """
    left = (until - time.monotonic()) / 2
    if left < 0.001:
        return _encode(None, "no time was left")
    signal.setitimer(signal.ITIMER_PROF, min(seconds, left))
    signal.setitimer(signal.ITIMER_REAL, min(STALLED * seconds, left))
    try:
        return _encode(function(*arguments))
    except Exception as error:  # such as MemoryError
        return _encode(None, f"{type(error).__name__} {error}"[:200])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _encode(*answer: object) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
