"""A closed terminal stops a run after its step, and output to that terminal does not fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import fcntl, signal, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if sys.argv[2] == "ignored":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from difrl.reporting.terminal import SilentDisplay
from difrl.training.interrupts import stop_requested
with stop_requested(SilentDisplay()) as stop:
    print("ready", flush=True)
    deadline = time.monotonic() + (60 if sys.argv[2] == "heard" else 1)
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    if stop.requested:
        print("stopping", flush=True)
    open(sys.argv[1], "w").write(str(stop.requested))
"""


@pytest.mark.parametrize("mode", ["heard", "ignored"])
def test_a_closed_terminal(tmp_path: Path, mode: str) -> None:
    master, slave = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(tmp_path / "end"), mode],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(slave)
    shown = b""
    while not shown.endswith(b"ready\r\n"):
        shown += os.read(master, 100)
    os.close(master)
    assert process.wait() == 0, process.stderr.read()
    assert (tmp_path / "end").read_text() == str(mode == "heard")
