"""A reward server in a process of its own, which goes away for a moment whenever it is told to."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

ABSENCE = 0.3
"""Seconds without a server."""


class Flapping:
    """The server, seen from the run that uses it."""

    def __init__(self, address: str, orders: Connection) -> None:
        self.address, self._orders = address, orders

    def flap(self) -> None:
        """Stop the server, and return when it is gone. It comes back on the same port after ABSENCE."""
        self._orders.send("stop")
        assert self._orders.recv() == "stopped"


@contextmanager
def flapping_server() -> Iterator[Flapping]:
    """Serve the reward `ones` of tests.texts on a free port during the block."""
    context = multiprocessing.get_context("spawn")
    orders, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield Flapping(f"http://127.0.0.1:{orders.recv()}", orders)
    finally:
        orders.close()
        process.join(10)
        process.terminate()


def _serve(orders: Connection) -> None:
    import threading

    from rewards.server import build_server, create_app, open_socket
    from tests.texts import Ones

    port = 0
    while True:
        with open_socket("127.0.0.1", port) as listener:
            first, port = port == 0, listener.getsockname()[1]
            server = build_server(create_app({"ones": Ones()}, version="1"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
            thread.start()
            if first:
                orders.send(port)
            try:
                orders.recv()
            except EOFError:  # the run is over
                return
            finally:
                server.should_exit = True
                thread.join()
        orders.send("stopped")
        time.sleep(ABSENCE)
