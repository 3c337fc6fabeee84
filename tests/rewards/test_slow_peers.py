"""Peers that are slow or endless on purpose, over raw sockets: clients of the server, and servers of the client."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import httpx
import pytest

from rewards import RewardError, make
from rewards.http import MOST_BYTES, Connection, HttpError
from rewards.remote import check_values
from rewards.server import DeadlineProtocol, Limits, create_app
from tests.loopback import serving
from tests.rewards.test_server import Mean, form, grey

SECONDS = 0.3
SCORE = b"POST /score/mean HTTP/1.1\r\nHost: here\r\nContent-Type: multipart/form-data; boundary=b\r\n"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server with short limits of time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeadlineProtocol, "seconds", SECONDS)
        with serving(create_app({"mean": Mean()}, version="1", limits=Limits(seconds=SECONDS))) as url:
            yield url


def connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=30)


def trickle(peer: socket.socket, byte: bytes) -> None:
    """Send a byte at a time, until the other side closes the connection."""
    with suppress(OSError):
        while True:
            peer.sendall(byte)
            threading.Event().wait(SECONDS / 20)


def answer(address: str, beginning: bytes, byte: bytes) -> bytes:
    """Return all that the server sends to a client which sends a beginning, and then a byte at a time."""
    with connect(address) as peer:
        peer.sendall(beginning)
        thread = threading.Thread(target=trickle, args=(peer, byte), daemon=True)
        thread.start()
        found = b""
        with suppress(ConnectionResetError):
            while part := peer.recv(65536):
                found += part
        thread.join()
        return found


def is_served(address: str) -> bool:
    files = form({"prompts": ["a"]}, grey(51))
    return httpx.post(f"{address}/score/mean", files=files, timeout=30).json() == {"values": [pytest.approx(0.2)]}


@pytest.mark.parametrize("beginning", [b"", b"GET /health HTTP/1.1\r\nX-Long: "])
def test_a_head_that_trickles_is_cut_off(address: str, beginning: bytes) -> None:
    assert answer(address, beginning, b"G") == b""
    assert is_served(address)


def test_a_second_head_that_trickles_is_cut_off(address: str) -> None:
    """A connection that has answered once waits for its next request no longer than for its first."""
    found = answer(address, b"GET /health HTTP/1.1\r\nHost: here\r\n\r\nGET /hea", b"l")
    assert found.startswith(b"HTTP/1.1 200")
    assert found.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "head", [SCORE + b"Content-Length: 60000000\r\n\r\n", SCORE + b"Transfer-Encoding: chunked\r\n\r\n1000\r\n"]
)
def test_a_body_that_trickles_is_408(address: str, head: bytes) -> None:
    found = answer(address, head + b'--b\r\nContent-Disposition: form-data; name="request"\r\n\r\n', b" ")
    assert found.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within 0.3 seconds" in found


def test_others_are_served_beside_clients_that_trickle() -> None:
    with serving(create_app({"mean": Mean()}, version="1")) as url:
        peers = [connect(url) for _ in range(60)]
        for peer in peers[:30]:
            peer.sendall(SCORE + b"Content-Length: 60000000\r\n\r\n--b")
        for peer in peers[30:]:
            peer.sendall(b"GET /hea")
        assert is_served(url)
        for peer in peers:
            peer.close()
        assert is_served(url)


@contextmanager
def answering(send: Callable[[socket.socket], object]) -> Iterator[str]:
    """A server that reads each request's beginning and calls `send`."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                peer.recv(65536)
                with suppress(OSError):
                    send(peer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def send_all(data: bytes) -> Callable[[socket.socket], None]:
    return lambda peer: peer.sendall(data)


def ok(body: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *headers, b"", body])


def trickle_after(beginning: bytes, byte: bytes) -> Callable[[socket.socket], None]:
    def send(peer: socket.socket) -> None:
        peer.sendall(beginning)
        trickle(peer, byte)

    return send


@pytest.mark.parametrize(
    "send",
    [
        trickle_after(b"", b"H"),
        trickle_after(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        trickle_after(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n[", b" "),
        trickle_after(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    ],
    ids=["status", "header", "body", "hints"],
)
def test_an_answer_that_trickles_meets_the_whole_time_limit(send: Callable[[socket.socket], None]) -> None:
    with answering(send) as url, pytest.raises(HttpError, match=r"no answer in time|cannot be reached"):
        Connection("far", url, timeout=SECONDS, retries=0).get("/x")


def test_an_answer_without_an_end_is_cut_off() -> None:
    def send(peer: socket.socket) -> None:
        peer.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            peer.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")

    with answering(send) as url, pytest.raises(HttpError, match=f"answered more than {MOST_BYTES} bytes"):
        Connection("far", url, retries=0).get("/x")


def test_a_compressed_answer_is_refused() -> None:
    """A kilobyte can hold a megabyte."""
    sent = send_all(ok(b"\x1f\x8b", b"Content-Encoding: gzip"))
    with answering(sent) as url, pytest.raises(HttpError, match="answered compressed, which was not asked for"):
        Connection("far", url, retries=0).get("/x")


def test_json_of_many_levels_is_no_answer() -> None:
    sent = send_all(ok(b"[" * 1_000_000))
    with answering(sent) as url, pytest.raises(HttpError, match="answered something that is not JSON"):
        Connection("far", url, retries=0).get("/x")


EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\u009b31m\r\nfine"
SHOWN = r"\\x1b\]0;owned\\x07\\x1b\[2J\\u202e\\x9b31m\\r\\nfine"


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": "%s"}',
        b'{"error": {"message": "%s"}}',
        b'{"detail": "%s"}',
        b"%s",
    ],
)
def test_escape_sequences_of_a_server_do_not_reach_the_terminal(body: bytes) -> None:
    text = body.replace(b"%s", json.dumps(EVIL)[1:-1].encode() if b"{" in body else EVIL.encode())
    sent = send_all(ok(text).replace(b"200 OK", b"400 Bad", 1))
    with answering(sent) as url, pytest.raises(HttpError, match=SHOWN):
        Connection("far", url, retries=0).get("/x")


@pytest.mark.parametrize(
    "answer",
    [
        {"protocol": EVIL},
        {"protocol": 1, "rewards": {EVIL: {}}},
        {"protocol": 1},
        {"protocol": 1, "rewards": [EVIL]},
        [EVIL],
        EVIL,
    ],
)
def test_escape_sequences_in_what_a_server_says_of_itself(answer: object) -> None:
    with answering(send_all(ok(json.dumps(answer).encode()))) as url:
        with pytest.raises(RewardError) as caught:
            make("remote", url=url, reward="mine", retries=0)(["text"], ["a"], [{}])
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("response", [EVIL, {"values": EVIL}, {"values": [EVIL]}, [EVIL]])
def test_escape_sequences_in_values(response: object) -> None:
    with pytest.raises(RewardError) as caught:
        check_values(response, 1, "http://far.example")
    assert str(caught.value).isprintable()
