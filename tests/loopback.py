"""An application served on a free port of this machine, by a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from rewards.server import build_server, get_url, open_socket


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The URL at which the application answers, until the block ends."""
    with open_socket("127.0.0.1", 0) as listener:
        running = build_server(app)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while not running.started and time.monotonic() < deadline:
                time.sleep(0.005)
            yield get_url(listener)
        finally:
            running.should_exit = True
            thread.join(10)
