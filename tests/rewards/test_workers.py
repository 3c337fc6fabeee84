"""Tests of calls in a process that can be killed: what a text does there stays there."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rewards import workers
from rewards.workers import DEADLINE, call_each

ACT = "tests.rewards.worker_functions:act"


def act(*what: str, seconds: float = 1) -> list[Any]:
    return call_each(ACT, [(each,) for each in what], seconds, "test")


def test_every_call_has_its_answer() -> None:
    assert act("a", "b", "a") == ["A", "B", "A"]
    assert call_each(ACT, [], 1, "test") == []
    assert act(*map(str, range(5000))) == list(map(str, range(5000)))


@pytest.mark.parametrize("what", ["power", "loop", "memory", "exit", "raise"])
def test_a_call_that_goes_wrong_has_no_answer_and_the_others_keep_theirs(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert act("a", what, "b", seconds=0.3) == ["A", None, "B"]
    assert "reward 'test': 1 of 3 texts are invalid: " in caplog.text


def test_the_reason_is_in_the_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        act("raise")
        act("loop", seconds=0.2)
    assert "1 of 1 texts are invalid: ValueError no such text" in caplog.text
    assert "judging it took over 0.2 s" in caplog.text


def test_a_worker_has_no_torch_no_file_of_this_process_and_the_same_hashes() -> None:
    with Path(__file__).open(), Path(__file__).open():
        torch, descriptors, first = act("torch", "descriptors", "hash")
    assert torch is False
    assert descriptors <= 7  # stdin, stdout, stderr, the channel, the shared byte, and the listed folder
    _end_idle_workers()
    assert act("hash") == [first]


def _end_idle_workers() -> None:
    for worker in workers._idle.pop(ACT, []):
        worker.close()


def _children() -> dict[int, str]:
    """Return the children of this process with their state."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid():
            found[int(path.parent.name)] = state
    return found


def test_no_zombie_is_left() -> None:
    before = set(_children())
    act("power", "exit", "a", seconds=0.2)
    os.kill(act("process")[0][1], signal.SIGKILL)
    time.sleep(0.2)
    assert act("a") == ["A"]
    _end_idle_workers()
    assert "Z" not in {state for pid, state in _children().items() if pid not in before}


def test_a_worker_that_was_killed_is_replaced() -> None:
    for index in range(2):  # the child, while it waits, and the forker
        os.kill(act("process")[0][index], signal.SIGKILL)
        time.sleep(0.2)
        assert act("a") == ["A"]


def test_threads_have_workers_of_their_own() -> None:
    def run(index: int) -> list[Any]:
        return act(f"a{index}", "loop", f"b{index}", seconds=0.3)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(8))) == [[f"A{index}", None, f"B{index}"] for index in range(8)]


def _act_in_child(what: str) -> list[Any]:
    return act(what)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_new_process_has_workers_of_its_own(method: str) -> None:
    (mine,) = act("process")
    with multiprocessing.get_context(method).Pool(1) as pool:
        (theirs,) = pool.apply(_act_in_child, ("process",))
    assert mine[0] != theirs[0]
    assert act("process") == [mine]


def test_half_of_the_time_is_left_for_the_calls_behind() -> None:
    act("a")
    token = DEADLINE.set(time.monotonic() + 2)
    try:
        assert act("a", "loop", "b", "loop", "c", seconds=60) == ["A", None, "B", None, "C"]
        DEADLINE.set(time.monotonic())
        assert act("a") == [None]
    finally:
        DEADLINE.reset(token)


def test_a_function_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"no_such_module:f.* did not start: ModuleNotFoundError: .*no_such_module"):
        call_each("no_such_module:f", [("a",)], 1, "test")


_SCRIPT = f"""
import threading, time
from rewards.workers import call_each
(pids,) = call_each({ACT!r}, [("process",)], 1, "test")
BUSY and threading.Thread(target=call_each, args=({ACT!r}, [("power",)], 600, "test")).start()
time.sleep(0.5)
print(*pids, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("busy", [True, False])
def test_workers_die_with_a_process_that_is_killed(busy: bool) -> None:
    script = [sys.executable, "-c", _SCRIPT.replace("BUSY", str(busy))]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(_is_alive, pids))
        parent.kill()
    waited = 0
    while any(map(_is_alive, pids)) and waited < 600:
        time.sleep(0.1)
        waited += 1
    assert not any(map(_is_alive, pids))


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
